package kme

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/auditlog"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// TrailDoor is the Backend of the operator door's routes of the audit log. Who reads
// it is recorded in it.
type TrailDoor struct {
	k      *KME
	reader *auditlog.Reader
}

// TrailDoor returns the Backend of the audit log's routes. The caller closes reader.
func (k *KME) TrailDoor(reader *auditlog.Reader) TrailDoor { return TrailDoor{k, reader} }

// read records that an operator reads the log, and has do read it: no reading without
// its record.
func (d TrailDoor) read(ctx context.Context, c identity.Caller, rid, what string, do func(context.Context) error) error {
	call := d.k.begin(c, rid, audit.AuditRead, identity.SAE{})
	call.ev.Reason = what
	begun := call.ev
	begun.Outcome = audit.Done
	recording, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	err := d.k.Store.RecordLate(recording, call.late, begun)
	cancel()
	if err != nil {
		call.pending = errors.Is(err, store.ErrDoubt)
		return call.refuse(ctx, err)
	}
	return d.readOn(ctx, c, rid, what, do)
}

// readOn is read of what was recorded already.
func (d TrailDoor) readOn(ctx context.Context, _ identity.Caller, _, _ string, do func(context.Context) error) error {
	err := do(ctx)
	switch {
	case errors.Is(err, auditlog.ErrNoLog), errors.Is(err, auditlog.ErrNoCheckpoint):
		return &problem.Error{Kind: problem.NotFound, Detail: "there is no audit log yet", Err: err}
	case errors.As(err, new(*problem.Error)):
		return err
	case err != nil:
		return &problem.Error{Kind: problem.Unavailable, Detail: "the audit log cannot be read", Err: err}
	}
	return nil
}

// Trail tells how the log stands.
func (d TrailDoor) Trail(ctx context.Context, c identity.Caller, rid string) (t admin.Trail, err error) {
	k := d.k
	err = d.read(ctx, c, rid, "how the log stands", func(ctx context.Context) error {
		logs, err := d.reader.Logs(ctx)
		if err != nil {
			return err
		}
		for _, l := range logs {
			log := admin.TrailLog{Origin: l.Origin, Name: l.Name, Key: k.logKeyOf(l), Size: l.Size, Begun: l.Begun}
			err := d.reader.Snapshot(ctx, l.Origin, func(s *auditlog.Snapshot) error {
				signed, err := s.Checkpoint(ctx, 0)
				log.Checkpoint = string(signed)
				return err
			})
			if err != nil && !errors.Is(err, auditlog.ErrNoCheckpoint) {
				return err
			}
			t.Logs = append(t.Logs, log)
		}
		me, err := audit.NewCosigner(k.witnessName(), k.trail.witnessKey)
		if err != nil {
			return err
		}
		t.Witness, t.Distrust = me.VerifierKey(), k.distrusted()
		if lag := k.lag.Load(); lag != nil {
			t.Waiting = lag.Events
		}
		for id := range k.Peers {
			seen, err := k.Store.WitnessedOf(ctx, id)
			if err != nil {
				return err
			}
			for _, w := range seen {
				t.Witnessed = append(t.Witnessed, admin.Witnessed{KME: id.String(), Log: w.Log, Key: w.Key, Size: w.Size, Checkpoint: w.Note})
			}
		}
		slices.SortFunc(t.Witnessed, func(a, b admin.Witnessed) int { return cmp.Compare(a.Log, b.Log) })
		return nil
	})
	return t, err
}

// maxFoundBytes is about how much of events one search finds: a client reads no answer
// without end.
const maxFoundBytes = 1 << 20

// Search looks for events.
func (d TrailDoor) Search(ctx context.Context, c identity.Caller, rid string, q admin.Query) (found admin.Findings, err error) {
	f := auditlog.Filter{
		From: q.From, To: q.To, First: q.First, SAE: q.SAE, Key: q.Key, Request: q.Request, Action: q.Action, Outcome: q.Outcome,
		Serial: q.Serial, Operator: q.Operator, Limit: q.Limit, Placed: q.Watch,
	}
	if q.Watch {
		q.First = 0 // it moves on with each question
	}
	read := d.read
	if q.Watch && !d.k.trail.watchBegins(c.ID()+" "+described(q), d.k.Now()) {
		read = d.readOn
	}
	err = read(ctx, c, rid, "search: "+described(q), func(ctx context.Context) error {
		return d.reader.Snapshot(ctx, q.Origin, func(l *auditlog.Snapshot) error {
			rows, err := l.Search(ctx, f)
			found.More = len(rows) == q.Limit
			size := 0
			for i, r := range rows {
				if size += len(r.Body); i > 0 && size > maxFoundBytes {
					found.More = true
					break
				}
				found.Events = append(found.Events, admin.Found{Leaf: r.Leaf, Text: string(r.Body)})
			}
			if err != nil || len(rows) > 0 || q.Origin == 0 {
				return err
			}
			now, err := l.Present(ctx)
			if err == nil && now != q.Origin {
				err = problem.New(problem.Gone, "the log of origin %d has ended: that of origin %d has begun", q.Origin, now)
			}
			return err
		})
	})
	return found, err
}

// watchTime is how long the record of a watch holds.
const watchTime = time.Minute

// watchBegins says whether a watch has to be recorded.
func (t *trail) watchBegins(who string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for other, at := range t.watches {
		if now.Sub(at) >= watchTime {
			delete(t.watches, other)
		}
	}
	if _, ok := t.watches[who]; ok {
		return false
	}
	if t.watches == nil {
		t.watches = make(map[string]time.Time)
	}
	t.watches[who] = now
	return true
}

// described is what was searched for, for the record.
func described(q admin.Query) string {
	var parts []string
	add := func(name, value string) {
		if value != "" {
			parts = append(parts, fmt.Sprintf("%s %q", name, value))
		}
	}
	if !q.From.IsZero() {
		add("from", q.From.UTC().Format(time.RFC3339))
	}
	if !q.To.IsZero() {
		add("to", q.To.UTC().Format(time.RFC3339))
	}
	if q.First > 0 {
		add("leaf", fmt.Sprint(q.First))
	}
	add("sae", q.SAE)
	add("key", q.Key)
	add("request", q.Request)
	add("action", q.Action)
	add("outcome", q.Outcome)
	add("serial", q.Serial)
	add("operator", q.Operator)
	return cmp.Or(strings.Join(parts, ", "), "all")
}

// Proof proves that the log of an origin has a leaf, if the database still has its event.
// Of one that has not it says which bundle has it.
func (d TrailDoor) Proof(ctx context.Context, c identity.Caller, rid string, origin, leaf int64) (p audit.Proof, err error) {
	what := fmt.Sprintf("proof of leaf %d", leaf)
	if origin > 0 {
		what += fmt.Sprintf(" of the log of origin %d", origin)
	}
	err = d.read(ctx, c, rid, what, func(ctx context.Context) error {
		return d.reader.Snapshot(ctx, origin, func(l *auditlog.Snapshot) error {
			if leaf >= l.Size {
				return problem.New(problem.NotFound, "the log has %d leaves", l.Size)
			}
			if a, archived, err := l.Archived(ctx, leaf); archived || err != nil {
				return cmp.Or(err, error(inBundle(leaf, a)))
			}
			key, err := audit.ParseLogKey(d.k.logKeyOf(l.LogState))
			if err != nil {
				return err
			}
			p, err = l.Prove(ctx, leaf, key)
			return err
		})
	})
	return p, err
}

// inBundle says where the event of a leaf is.
func inBundle(leaf int64, a auditlog.Archived) *problem.Error {
	return problem.New(problem.Gone, "leaf %d left the database with its day, %s: it is in the bundle %s of the archive (SHA-256 %x), of which kmectl audit prove %d --bundle %[3]s makes the proof",
		leaf, a.Day.Format(time.DateOnly), a.File, a.Sum, leaf)
}

// Bundle writes a part of the log.
func (d TrailDoor) Bundle(ctx context.Context, c identity.Caller, rid string, origin, first, end int64, ready func() io.Writer) error {
	what := fmt.Sprintf("bundle of leaves %d to %d", first, end-1)
	if end == 0 {
		what = fmt.Sprintf("bundle of all from leaf %d", first)
	}
	return d.read(ctx, c, rid, what, func(ctx context.Context) error {
		return d.reader.Snapshot(ctx, origin, func(l *auditlog.Snapshot) error {
			key, err := audit.ParseLogKey(d.k.logKeyOf(l.LogState))
			if err != nil {
				return err
			}
			if first > l.Size || end > l.Size || end > 0 && first > end {
				return problem.New(problem.Invalid, "leaves %d to %d: the log has %d", first, end, l.Size)
			}
			if end > first {
				if a, archived, err := l.Archived(ctx, first); archived || err != nil {
					return cmp.Or(err, error(inBundle(first, a)))
				}
			}
			spec := audit.BundleSpec{Key: d.k.logKeyOf(l.LogState), First: first, End: end, At: d.k.Now()}
			if end > 0 {
				spec.Signed, err = l.Cosigned(ctx, end)
			} else {
				err = d.wholeLog(ctx, l, &spec)
			}
			if err == nil {
				spec.Checkpoint, _, err = audit.OpenCheckpoint(spec.Signed, key)
			}
			if err != nil {
				return err
			}
			return audit.WriteBundle(ctx, ready(), spec, l)
		})
	})
}

// wholeLog fills in what a bundle of all that there is of the log has: the last
// checkpoint, and one before it that witnesses have signed.
func (d TrailDoor) wholeLog(ctx context.Context, l *auditlog.Snapshot, spec *audit.BundleSpec) error {
	kept, err := l.Kept(ctx)
	if err != nil {
		return err
	}
	spec.First, spec.End, spec.Tail = max(spec.First, kept), l.Size, !l.Ended // what is before is in archives
	if spec.Signed, err = l.Checkpoint(ctx, 0); err != nil {
		return err
	}
	cosigned, err := l.Cosigned(ctx, spec.First+1)
	if errors.Is(err, auditlog.ErrNoCheckpoint) {
		return nil
	}
	if !bytes.Equal(cosigned, spec.Signed) {
		spec.Cosigned = cosigned
	}
	return err
}
