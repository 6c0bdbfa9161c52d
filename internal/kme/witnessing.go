package kme

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
)

// A checkpoint is published once it is committed: to a file, to the log of the daemon,
// and to the witnesses, which are the peers and whoever else was named. A witness
// signs only what follows all that it has signed before, so a log that was forked or
// rewound is found out by both ends.

// OtherWitness is a witness beside the peers, which speaks C2SP tlog-witness over HTTP.
type OtherWitness struct {
	URL string        // of add-checkpoint
	Key audit.Witness // what it must sign with
}

// publishTime bounds what is done with one checkpoint at one witness.
const publishTime = 5 * time.Second

// loudEvery is how often a checkpoint is told to the daemon's log.
const loudEvery = time.Minute

// publish gives out each new checkpoint, as long as this node is the one of its site
// that does.
func (k *KME) publish(ctx context.Context) error {
	var p published
	return k.every(ctx, time.Second, nil, func(ctx context.Context) { k.publishNew(ctx, &p) })
}

// published is what a node has given out.
type published struct {
	last store.Signed
	loud time.Time // when the daemon's log was told of one
}

// publishNew gives out the last checkpoint, if it is new or a witness has not signed it.
//
// An old primary knows of less than was given out, and one that was never more than on
// its way to the standby may be lost: so a new one is read again, for sure, before it is
// shown to anybody or held against the log. That is a commit for each checkpoint, beside
// the one that each witness's signature takes, and none while the log rests.
func (k *KME) publishNew(ctx context.Context, p *published) {
	if k.Store.Healthy() != nil {
		return
	}
	asking, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	now, err := k.Store.LastCheckpoint(asking)
	if err == nil && now != p.last {
		now, err = k.Store.SurelyLastCheckpoint(asking)
	}
	if err != nil {
		k.Log.Debug("reading the last checkpoint", "err", err)
		return
	}
	if now.Origin == 0 {
		return
	}
	if now.Origin == p.last.Origin && now.Size < p.last.Size {
		k.distrust(ctx, fmt.Sprintf("the log has %d leaves, and had %d", now.Size, p.last.Size))
		return
	}
	if now.Note != p.last.Note {
		if err := k.keepCheckpoint(now.Note); err != nil {
			k.raise(ctx, "audit-file", err.Error())
		} else {
			k.clear(ctx, "audit-file")
		}
		if k.Now().Sub(p.loud) >= loudEvery {
			k.Log.Info("audit checkpoint", "checkpoint", now.Note)
			p.loud = k.Now()
		}
		p.last = now
	}
	for id, client := range k.Peers {
		k.submit(ctx, now, cosigner{id.String(), client.Checkpoint, client.Witnessed})
	}
	for _, w := range k.Trail.Witnesses {
		k.submit(ctx, now, cosigner{name: w.Key.Name(), add: w.add})
	}
}

// cosigner is a witness as the log sees it.
type cosigner struct {
	name string
	add  func(context.Context, audit.Submission) (audit.Cosigned, error)
	seen func(context.Context) (audit.Witnessed, error) // tells what it has last seen of the site's logs; nil: it cannot
}

func (w cosigner) alarm() string { return "audit-witness-" + w.name }

// submit has a witness sign a checkpoint that it has not signed yet.
func (k *KME) submit(ctx context.Context, s store.Signed, w cosigner) {
	known := fmt.Sprintf("%s/%d", w.name, s.Origin)
	ctx, cancel := context.WithTimeout(ctx, publishTime)
	defer cancel()
	for range 2 { // a second time if it has last seen another one than we know of
		old := k.trail.seenBy(known)
		if old == s.Size {
			return
		}
		answer, err := k.askWitness(ctx, s, old, w.add)
		var forked *forkError
		switch {
		case errors.As(err, &forked):
			k.accused(ctx, s, w, fmt.Sprintf("%s refuses checkpoint %d: %v", w.name, s.Size, err))
			return
		case err != nil:
			k.suspect(ctx, w.alarm(), fmt.Sprintf("%s does not cosign the audit log: %v", w.name, err))
			return
		}
		k.trail.saw(known, answer.Size)
		if answer.Line == "" {
			if answer.Size > s.Size {
				k.judgeRewound(ctx, s, w, answer.Size)
				return
			}
			continue
		}
		if err := k.Store.AddCosignature(ctx, s, w.name, answer.Line); err != nil {
			k.Log.Warn("keeping a cosignature", "witness", w.name, "err", err)
		}
		k.clear(ctx, w.alarm())
		return
	}
}

// judgeRewound looks again, for sure: another node of the site may have published more.
// If the log is shorter than what a witness has signed, it was cut.
func (k *KME) judgeRewound(ctx context.Context, s store.Signed, w cosigner, size int64) {
	now, err := k.Store.SurelyLastCheckpoint(ctx)
	if err == nil && now.Origin == s.Origin && now.Size < size {
		k.accused(ctx, now, w, fmt.Sprintf("the log has %d leaves, and %s has witnessed %d", now.Size, w.name, size))
	}
}

// accused judges a witness's word that the log was forked or rewound. A peer shows what it
// has seen, which the log's key must have signed and the log not follow: by its word alone
// it could stop this site. Another witness has no way to show it, and was named by this
// site's owner to be believed.
func (k *KME) accused(ctx context.Context, s store.Signed, w cosigner, why string) {
	if w.seen != nil {
		seen, err := w.seen(ctx)
		if err == nil {
			s, err = k.Store.SurelyLastCheckpoint(ctx) // after what was seen
		}
		if err == nil {
			err = k.contradicted(s, seen.Notes)
		}
		if err == nil {
			err = errors.New("it shows nothing that the log does not follow")
		}
		if bad, ok := errors.AsType[*audit.BadLeaf](err); ok {
			why += ": " + bad.Error()
		} else {
			k.raise(ctx, w.alarm(), fmt.Sprintf("%s; %v", why, err))
			return
		}
	}
	k.distrust(ctx, why)
}

// contradicted says that the log does not follow one of the checkpoints that somebody shows,
// a *audit.BadLeaf, or is nil. Those that the log has not signed count for nothing.
func (k *KME) contradicted(s store.Signed, shown []string) error {
	key, err := audit.ParseLogKey(k.logKeyText(s.Origin))
	if err != nil {
		return err
	}
	now, _, err := audit.OpenCheckpoint([]byte(s.Note), key)
	if err != nil {
		return err
	}
	for _, note := range shown {
		was, _, err := audit.OpenCheckpoint([]byte(note), key)
		if err != nil {
			continue // of another origin, or nobody's
		}
		if err := audit.Follows(now, was, k.Store.Tiles(s.Origin)); err != nil {
			return err
		}
	}
	return nil
}

// forkError is a witness's word that a checkpoint does not follow what it has seen.
type forkError struct{ err error }

func (e *forkError) Error() string { return e.err.Error() }

func (k *KME) askWitness(ctx context.Context, s store.Signed, old int64, ask func(context.Context, audit.Submission) (audit.Cosigned, error)) (audit.Cosigned, error) {
	key, err := audit.ParseLogKey(k.logKeyText(s.Origin))
	if err != nil {
		return audit.Cosigned{}, err
	}
	c, _, err := audit.OpenCheckpoint([]byte(s.Note), key)
	if err != nil {
		return audit.Cosigned{}, err
	}
	if old > c.Size {
		return audit.Cosigned{Size: old}, nil
	}
	proof, err := audit.ProveGrowth(c, old, k.Store.Tiles(s.Origin))
	if err != nil {
		return audit.Cosigned{}, err
	}
	answer, err := ask(ctx, audit.Submission{Key: k.logKeyText(s.Origin), Old: old, Proof: proof, Note: s.Note})
	if refused, ok := errors.AsType[*peer.Refused](err); ok && refused.Status == http.StatusForbidden {
		return answer, &forkError{err}
	}
	return answer, err
}

func (t *trail) seenBy(witness string) int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.chosen[witness]
}

func (t *trail) saw(witness string, size int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.chosen == nil {
		t.chosen = make(map[string]int64)
	}
	t.chosen[witness] = size
}

// peerBroken is why the log of a peer is not to be trusted, "" while it is.
func (t *trail) peerBroken(id identity.KME) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.peers[id]
}

// trust ends what was held against the log of a peer, which has been recovered since.
func (t *trail) trust(id identity.KME) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.peers, id)
}

// Checkpoint cosigns a checkpoint of a peer's log, if it follows what was seen of it.
func (d PeerDoor) Checkpoint(ctx context.Context, from identity.KME, s audit.Submission) (audit.Cosigned, error) {
	k := d.k
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), requestTime)
	defer cancel()
	answer, err := k.witness(ctx, from, s)
	var forked *forkError
	if errors.As(err, &forked) {
		k.trail.mu.Lock()
		if k.trail.peers == nil {
			k.trail.peers = make(map[identity.KME]string)
		}
		k.trail.peers[from] = forked.Error()
		k.trail.mu.Unlock()
		k.raise(ctx, "audit-log-"+from.String(), fmt.Sprintf("the audit log of %s: %v", from, forked))
		return answer, &problem.Error{Kind: problem.Forbidden, Detail: forked.Error(), Err: forked}
	}
	if p, ok := errors.AsType[*problem.Error](err); ok && p.Kind == problem.Invalid {
		return answer, d.refuseAs(ctx, from, p)
	}
	return answer, err
}

// Witnessed tells a peer what was last seen of its logs: one that was restored to the
// past has forgotten.
func (d PeerDoor) Witnessed(ctx context.Context, from identity.KME) (w audit.Witnessed, err error) {
	seen, err := d.k.Store.WitnessedOf(ctx, from)
	for _, s := range seen[max(0, len(seen)-audit.MaxWitnessed):] {
		w.Notes = append(w.Notes, s.Note)
	}
	return w, err
}

// maxWitnessedLogs is of how many logs of one peer it is kept what was seen, which is for
// ever: a peer has one for each of its recoveries.
const maxWitnessedLogs = 1024

// witness judges a submission. Nothing is signed before it is kept.
func (k *KME) witness(ctx context.Context, from identity.KME, s audit.Submission) (audit.Cosigned, error) {
	me, err := audit.NewCosigner(k.witnessName(), k.trail.witnessKey)
	if err != nil {
		return audit.Cosigned{}, err
	}
	seen, err := k.Store.WitnessedOf(ctx, from)
	if err != nil {
		return audit.Cosigned{}, err
	}
	key, err := k.peerLogKey(from, s.Key, seen)
	if err != nil {
		return audit.Cosigned{}, err
	}
	c, _, err := audit.OpenCheckpoint([]byte(s.Note), key)
	if err != nil {
		return audit.Cosigned{}, problem.Because(problem.Invalid, err)
	}
	var was store.Witnessed
	for _, w := range seen {
		if w.Log == c.Origin {
			was = w
		}
	}
	if was.Note == "" && len(seen) >= maxWitnessedLogs {
		return audit.Cosigned{}, problem.New(problem.Invalid, "%d logs of %s are known here: its site has not been recovered so often", len(seen), from)
	}
	before, err := sizeAndRoot(was, key)
	if err != nil {
		return audit.Cosigned{}, err
	}
	answer := audit.Cosigned{Size: before.Size, Witness: me.VerifierKey()}
	if s.Old != before.Size && c.Size != before.Size || c.Size < before.Size {
		return answer, nil // the log has to prove more, or it speaks of what is long past
	}
	proof := s.Proof
	if c.Size == before.Size {
		proof = nil
	}
	if err := audit.CheckGrowth(before, c, proof); err != nil {
		return answer, &forkError{fmt.Errorf("%w (seen here: %q; now: %q)", err, was.Note, s.Note)}
	}
	err = k.Store.KeepWitnessed(ctx, from, before.Size, store.Witnessed{Log: c.Origin, Key: s.Key, Size: c.Size, Note: s.Note})
	if errors.Is(err, store.ErrWitnessed) {
		return answer, problem.Because(problem.Unavailable, err)
	}
	if err != nil {
		return answer, err
	}
	if answer.Line, err = me.Cosign(ctx, c, k.Now()); err != nil {
		return answer, err
	}
	answer.Size = c.Size
	k.trail.mu.Lock()
	_, stands := k.trail.peers[from]
	k.trail.mu.Unlock()
	if !stands {
		k.clear(ctx, "audit-log-"+from.String())
	}
	return answer, nil
}

// witnessName is the name under which this site signs the checkpoints of others.
func (k *KME) witnessName() string { return k.Trail.TrustDomain + "/" + k.Self.String() + "/witness" }

// sizeAndRoot is what was seen of a log; nothing, of one that was not.
func sizeAndRoot(w store.Witnessed, key audit.LogKey) (audit.Checkpoint, error) {
	if w.Note == "" {
		return audit.Checkpoint{}, nil
	}
	c, _, err := audit.OpenCheckpoint([]byte(w.Note), key)
	if err == nil && c.Size != w.Size {
		err = fmt.Errorf("size %d is kept with a checkpoint of %d", w.Size, c.Size)
	}
	if err != nil {
		return c, fmt.Errorf("what was witnessed of %s is not what was kept: %w", w.Log, err)
	}
	return c, nil
}

// peerLogKey is the key with which the log of a peer must be signed: the one that was
// given for it, or else the first that was seen. A log of a later origin has another
// name and the same key.
func (k *KME) peerLogKey(from identity.KME, claimed string, seen []store.Witnessed) (audit.LogKey, error) {
	key, err := audit.ParseLogKey(claimed)
	if err != nil {
		return key, problem.Because(problem.Invalid, err)
	}
	if want := audit.VouchName(audit.LogName(k.Trail.TrustDomain, from.String(), 1)); key.Site != want {
		return key, problem.New(problem.Invalid, "log %s is not one of %s", key.Name(), want)
	}
	known, ok := k.Trail.PeerKeys[from]
	if !ok && len(seen) > 0 {
		known = seen[0].Key
	}
	if known == "" {
		return key, nil
	}
	first, err := audit.ParseLogKey(known)
	if err != nil {
		return key, err
	}
	if !key.SamePublic(first) {
		return key, &forkError{fmt.Errorf("it is signed with another key (%s) than the one known for it (%s)", claimed, known)}
	}
	return key, nil
}

// add implements C2SP tlog-witness's add-checkpoint.
func (w OtherWitness) add(ctx context.Context, s audit.Submission) (audit.Cosigned, error) {
	var body bytes.Buffer
	fmt.Fprintf(&body, "old %d\n", s.Old)
	for _, h := range s.Proof {
		body.WriteString(tlog.Hash(h).String() + "\n")
	}
	body.WriteString("\n" + s.Note)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.URL, &body)
	if err != nil {
		return audit.Cosigned{}, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return audit.Cosigned{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return audit.Cosigned{}, err
	}
	switch {
	case resp.StatusCode == http.StatusConflict && resp.Header.Get("Content-Type") == "text/x.tlog.size":
		size, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		return audit.Cosigned{Size: size}, err
	case resp.StatusCode == http.StatusConflict || resp.StatusCode == http.StatusUnprocessableEntity:
		return audit.Cosigned{}, &forkError{fmt.Errorf("%d %.200q", resp.StatusCode, text)}
	case resp.StatusCode != http.StatusOK:
		return audit.Cosigned{}, fmt.Errorf("%d %.200q", resp.StatusCode, text)
	}
	c, err := audit.CheckCosignature(s.Note, string(text), w.Key)
	if err != nil {
		return audit.Cosigned{}, err
	}
	return audit.Cosigned{Size: c.Size, Line: string(text)}, nil
}
