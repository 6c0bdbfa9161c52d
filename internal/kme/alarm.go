package kme

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/store"
)

// Alarm is something an operator should know of. It stands from Since until its
// cause is gone.
type Alarm struct {
	Name  string // what it is about: hsm, peer-km2, link-km1-km2 ...
	Text  string
	Since time.Time
}

// alarms are those that stand now, and what may become one.
type alarms struct {
	mu       sync.Mutex
	standing map[string]Alarm
	untold   map[string]bool      // those that could not be recorded yet
	ending   map[string]time.Time // when those end that are of something that has happened
	failing  map[string]time.Time // since when, for what is given some patience
}

// trailAlarm begins the name of each alarm about the audit log, its tree or its ways
// out: with one that is raised, the log says of itself that it failed.
const trailAlarm = "audit-"

// patience is how long something that comes and goes may fail before it is an
// alarm: a peer that starts a moment after us is none.
const patience = 3 * time.Second

// suspect raises an alarm once its cause has stood for longer than patience.
func (k *KME) suspect(ctx context.Context, name, text string) {
	k.alarms.mu.Lock()
	if k.alarms.failing == nil {
		k.alarms.failing = make(map[string]time.Time)
	}
	since, ok := k.alarms.failing[name]
	if !ok {
		since = k.Now()
		k.alarms.failing[name] = since
	}
	k.alarms.mu.Unlock()
	if k.Now().Sub(since) >= patience {
		k.raise(ctx, name, text)
	}
}

// raise records an alarm and lets it stand; one that stands already is only updated.
// One that could not be recorded, since the database is away, is when it is raised again.
func (k *KME) raise(ctx context.Context, name, text string) {
	k.alarms.mu.Lock()
	old, stands := k.alarms.standing[name]
	if k.alarms.standing == nil {
		k.alarms.standing = make(map[string]Alarm)
	}
	a := Alarm{Name: name, Text: text, Since: k.Now()}
	if stands {
		a.Since = old.Since
	}
	k.alarms.standing[name] = a
	untold := k.alarms.untold[name]
	delete(k.alarms.untold, name)
	k.alarms.mu.Unlock()
	if stands && !untold {
		return
	}
	if !stands {
		k.Log.Error("alarm", "about", name, "text", text)
	}
	ev := k.own(audit.Alarm)
	ev.Outcome, ev.Reason = audit.Failed, name+": "+text
	evs := []audit.Event{ev}
	if strings.HasPrefix(name, trailAlarm) {
		ev.Action = audit.AuditFailure
		evs = append(evs, ev)
	}
	if k.note(ctx, evs...) {
		return
	}
	k.alarms.mu.Lock()
	defer k.alarms.mu.Unlock()
	if k.alarms.untold == nil {
		k.alarms.untold = make(map[string]bool)
	}
	k.alarms.untold[name] = true
}

// incidentTime is how long an alarm stands of something that has happened and may be
// over: long enough to be seen, and for what happens again to be one alarm.
const incidentTime = 10 * time.Minute

// incident raises an alarm of something that has happened. It ends by itself.
func (k *KME) incident(ctx context.Context, name, text string) {
	k.alarms.mu.Lock()
	if k.alarms.ending == nil {
		k.alarms.ending = make(map[string]time.Time)
	}
	k.alarms.ending[name] = k.Now().Add(incidentTime)
	k.alarms.mu.Unlock()
	k.raise(ctx, name, text)
}

// endIncidents clears the alarms of incidents that have not happened again for long.
func (k *KME) endIncidents(ctx context.Context) {
	var over []string
	k.alarms.mu.Lock()
	for name, end := range k.alarms.ending {
		if !k.Now().Before(end) {
			over = append(over, name)
			delete(k.alarms.ending, name)
		}
	}
	k.alarms.mu.Unlock()
	for _, name := range over {
		k.clear(ctx, name)
	}
}

// clear ends an alarm whose cause is gone.
func (k *KME) clear(ctx context.Context, name string) {
	k.alarms.mu.Lock()
	a, stood := k.alarms.standing[name]
	delete(k.alarms.standing, name)
	delete(k.alarms.failing, name)
	delete(k.alarms.untold, name)
	k.alarms.mu.Unlock()
	if !stood {
		return
	}
	k.Log.Info("alarm over", "about", name, "stood", k.Now().Sub(a.Since).Round(time.Millisecond))
	ev := k.own(audit.Alarm)
	ev.Reason = name + " is over"
	k.note(ctx, ev)
}

// note records events that no request waits for, and says whether it did. Those that
// are lost because the database is away are still in the daemon's log, and the alarms say
// that it is away; those that are lost because too many wait are counted.
func (k *KME) note(ctx context.Context, evs ...audit.Event) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	err := k.Store.Record(ctx, evs...)
	if err != nil {
		k.Log.Warn("recording an event", "action", evs[0].Action, "err", err)
		if errors.Is(err, store.ErrOverflow) {
			k.overflow.count(len(evs))
		}
	}
	return err == nil
}

// stands says whether an alarm stands.
func (k *KME) stands(name string) bool {
	k.alarms.mu.Lock()
	defer k.alarms.mu.Unlock()
	_, ok := k.alarms.standing[name]
	return ok
}

// Alarms lists those that stand, oldest first.
func (k *KME) Alarms() []Alarm {
	k.alarms.mu.Lock()
	defer k.alarms.mu.Unlock()
	list := make([]Alarm, 0, len(k.alarms.standing))
	for _, a := range k.alarms.standing {
		list = append(list, a)
	}
	slices.SortFunc(list, func(a, b Alarm) int { return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Name, b.Name)) })
	return list
}

// own is the beginning of an event about an act of this node.
func (k *KME) own(a audit.Action) audit.Event {
	return audit.Event{Action: a, Outcome: audit.Done, Actor: audit.Actor{Role: "node", ID: k.Node}}
}
