package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/pgdev"
)

// What callers get when a part is gone, and that it comes back without a restart.
// One lab goes through it all. Its pool is filled at the start and stays above its
// limit for long, so that what is stored changes by requests alone.
func TestDegraded(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) { c.Filler, c.PoolLimit = 1024, 1100 })
	keysStored(t, l, 1000)
	run1, run2 := node(t, l.KM1).Run, node(t, l.KM2).Run
	for _, part := range []struct {
		name string
		test func(*testing.T, *Lab)
	}{
		{"HSM token moved away", tokenMoved},
		{"peer stopped", peerStopped},
		{"peer frozen", peerFrozen},
		{"database stopped", databaseStopped},
		{"database hangs", databaseHangs},
		{"database killed", func(t *testing.T, l *Lab) { databaseKilled(t, l, l.KM1) }},
		{"database of the peer killed", func(t *testing.T, l *Lab) { databaseKilled(t, l, l.KM2) }},
		{"no plaintext", noPlaintext}, // last: trouble makes programs talk
	} {
		t.Run(part.name, func(t *testing.T) { part.test(t, l) })
	}
	if got := node(t, l.KM1).Run; got != run1 {
		t.Errorf("KM1 is in run %d and was in run %d: somebody has restarted it", got, run1)
	}
	if got := node(t, l.KM2).Run; got != run2+1 {
		t.Errorf("KM2 is in run %d and was in run %d: somebody has restarted it, more than once", got, run2)
	}
}

// failed is a condition of recorded: requests of this kind that were answered 503.
const failed = `e->>'action' = $1 AND e->>'outcome' = 'failed'`

// noticed is how soon after its HSM has gone a KME refuses.
const noticed = 2*time.Second + stall

// stall is what these tests add to each bound of the product's, for a machine that stands
// still now and then. What they hold is that nobody waits for a client's own patience of
// ten seconds.
const stall = 3 * time.Second

func tokenMoved(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	due := get(t, bob, alice, 4)

	away := l.KM1.TokenDir() + ".away"
	if err := os.Rename(l.KM1.TokenDir(), away); err != nil {
		t.Fatal(err)
	}
	moved := time.Now()
	untilAway(t, alice, bob)
	if took := time.Since(moved); took > noticed {
		t.Errorf("KM1 refused %v after its token had gone, want %v", took, noticed)
	}
	untilAlarm(t, l.KM1, "hsm", true)
	if node(t, l.KM1).HSM.OK {
		t.Error("the operator door says that the HSM is well")
	}

	encs, decs := recorded(t, l.KM1, failed, "enc_keys"), recorded(t, l.KM1, failed, "dec_keys")
	here, there := stored(t, alice, bob), stored(t, bob, alice)
	for range 5 {
		began := time.Now()
		wantAway(t, "enc_keys", enc(t.Context(), alice, bob))
		_, err := alice.Client.DecKeys(t.Context(), bob.ID, due.ids())
		wantAway(t, "dec_keys", err)
		if took := time.Since(began); took > noticed {
			t.Errorf("two refusals took %v, want at most %v", took, noticed)
		}
	}
	wantAway(t, "enc_keys at the peer", enc(t.Context(), bob, alice))
	if a, b := stored(t, alice, bob), stored(t, bob, alice); a != here || b != there {
		t.Errorf("%d and %d keys are stored, and %d and %d were: the refusals have consumed some", a, b, here, there)
	}
	if n := recorded(t, l.KM1, failed, "enc_keys") - encs; n != 5 {
		t.Errorf("%d events of refused enc_keys, want 5", n)
	}
	if n := recorded(t, l.KM1, failed, "dec_keys") - decs; n != 5 {
		t.Errorf("%d events of refused dec_keys, want 5", n)
	}

	if err := os.Rename(away, l.KM1.TokenDir()); err != nil {
		t.Fatal(err)
	}
	untilServed(t, alice, bob)
	take(t, alice, bob, due)
	take(t, bob, alice, get(t, alice, bob, 2))
	untilAlarm(t, l.KM1, "hsm", false)
}

func peerStopped(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	due := get(t, bob, alice, 3)
	if err := l.KM2.Stop(); err != nil {
		t.Fatal(err)
	}
	before, events := stored(t, alice, bob), recorded(t, l.KM1, failed, "enc_keys")
	for range 5 {
		wantAway(t, "enc_keys", enc(t.Context(), alice, bob))
	}
	if n := stored(t, alice, bob); n != before {
		t.Errorf("%d keys are stored, and %d were: the refusals have consumed some", n, before)
	}
	if n := recorded(t, l.KM1, failed, "enc_keys") - events; n != 5 {
		t.Errorf("%d events of refused enc_keys, want 5", n)
	}
	take(t, alice, bob, due) // assigned before
	untilAlarm(t, l.KM1, "peer-km2", true)
	if err := l.KM2.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	untilServed(t, alice, bob)
	take(t, bob, alice, get(t, alice, bob, 2))
	untilAlarm(t, l.KM1, "peer-km2", false)
}

// peerFrozen leaves KM1 in doubt about an announce: it was sent, and nothing tells
// whether it was heard.
func peerFrozen(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	signal := func(s syscall.Signal) {
		if err := l.KM2.kmed.signal(s); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = l.KM2.kmed.signal(syscall.SIGCONT) }) // for the tests that follow
	root := operator(t, l.KM1)
	for doubt := false; !doubt; {
		get(t, alice, bob, 1) // the connection to the peer is there, and will take the announce
		signal(syscall.SIGSTOP)
		began := time.Now()
		wantAway(t, "enc_keys", enc(t.Context(), alice, bob))
		if took := time.Since(began); took > requestTime+stall {
			t.Errorf("the refusal took %v, longer than a request may", took)
		}
		for end := time.Now().Add(2 * stall); !doubt && time.Now().Before(end); {
			alarms, err := root.Alarms(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			doubt = slices.ContainsFunc(alarms, func(a admin.Alarm) bool { return a.Name == "announce-km2" })
		}
		if !doubt { // it was not sent: the machine stood still, and the connection was given up meanwhile
			signal(syscall.SIGCONT)
			untilServed(t, alice, bob)
		}
	}
	wantAway(t, "enc_keys while an announce is in doubt", enc(t.Context(), alice, bob))
	signal(syscall.SIGCONT)
	untilServed(t, alice, bob)
	untilAlarm(t, l.KM1, "announce-km2", false)
}

func databaseStopped(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	due := get(t, bob, alice, 2)
	const summaries = `SELECT coalesce(sum((body::jsonb->>'count')::int), 0) FROM kme.audit WHERE body::jsonb->>'action' = 'outage-summary'`
	before, err := number(t.Context(), l.KM1, summaries)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.KM1.StopDatabase(); err != nil {
		t.Fatal(err)
	}
	untilAlarm(t, l.KM1, "database", true)
	if node(t, l.KM1).Database.OK {
		t.Error("the operator door says that the database is well")
	}
	refused := 0
	for range 5 {
		wantAway(t, "enc_keys", enc(t.Context(), alice, bob))
		_, err := alice.Client.DecKeys(t.Context(), bob.ID, due.ids())
		wantAway(t, "dec_keys", err)
		_, err = alice.Client.Status(t.Context(), bob.ID)
		wantAway(t, "status", err)
		refused += 3
	}
	wantAway(t, "enc_keys at the peer", enc(t.Context(), bob, alice))
	if err := l.KM1.StartDatabase(t.Context()); err != nil {
		t.Fatal(err)
	}
	untilServed(t, alice, bob)
	untilServed(t, bob, alice)
	take(t, alice, bob, due)
	take(t, bob, alice, get(t, alice, bob, 2))
	untilAlarm(t, l.KM1, "database", false)
	eventually(t, "a summary of the outage", func(ctx context.Context) error {
		n, err := number(ctx, l.KM1, summaries)
		if err == nil && n < before+refused {
			err = fmt.Errorf("%d refusals are counted, and there were %d", n-before, refused)
		}
		return err
	})
}

// databaseHangs lets no commit through for a while: requests that wait for theirs
// end in time, and what becomes of their commits is settled later.
func databaseHangs(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	get(t, alice, bob, 1)
	conn, err := pgx.Connect(t.Context(), l.KM1.DSN(pgdev.Superuser))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "LOCK TABLE kme.node_run IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	var wait sync.WaitGroup
	for range 3 {
		wait.Go(func() { wantAway(t, "enc_keys", enc(t.Context(), alice, bob)) })
	}
	wait.Wait()
	if took := time.Since(began); took > requestTime+stall {
		t.Errorf("the refusals took %v, want about %v", took, requestTime)
	}
	untilAlarm(t, l.KM1, "database", true) // from now on nobody waits
	began = time.Now()
	wantAway(t, "enc_keys", enc(t.Context(), alice, bob))
	if took := time.Since(began); took > noticed {
		t.Errorf("a refusal took %v after the database was known to hang", took)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	untilServed(t, alice, bob)
	take(t, bob, alice, get(t, alice, bob, 2))
	untilAlarm(t, l.KM1, "database", false)
}

// requestTime is how long a request may take, whatever hangs.
const requestTime = 5 * time.Second

// databaseKilled kills a site's database under load: whatever a master was answered
// must be there for its slave, and everything must go on by itself.
func databaseKilled(t *testing.T, l *Lab, s *Site) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	load := startLoad(t, alice, bob, 4)
	load.grow(t, 40)
	if err := s.KillDatabase(); err != nil {
		t.Fatal(err)
	}
	untilAway(t, alice, bob)
	if err := s.StartDatabase(t.Context()); err != nil {
		t.Fatal(err)
	}
	untilServed(t, alice, bob)
	load.grow(t, 40)
	take(t, bob, alice, load.end(t))
}

// load is masters that ask for keys all the time.
type load struct {
	cancel context.CancelFunc
	ended  sync.WaitGroup

	mu    sync.Mutex
	got   keySet
	wrong []error // answers other than a key and a 503
}

func startLoad(t testing.TB, master, slave *Person, workers int) *load {
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{cancel: cancel, got: make(keySet)}
	for range workers {
		l.ended.Go(func() {
			for ctx.Err() == nil {
				// What is under way at the end is finished: an answer that nobody
				// reads is a key that nobody may take.
				c, err := master.Client.EncKeys(context.WithoutCancel(ctx), slave.ID, etsi014.KeyRequest{})
				l.mu.Lock()
				l.got.add(c)
				if err != nil && away(err) == nil {
					l.wrong = append(l.wrong, err)
				}
				l.mu.Unlock()
			}
		})
	}
	t.Cleanup(func() { cancel(); l.ended.Wait() })
	return l
}

// grow waits until n more keys were got.
func (l *load) grow(t testing.TB, n int) {
	t.Helper()
	l.mu.Lock()
	n += len(l.got)
	l.mu.Unlock()
	eventually(t, "keys under load", func(context.Context) error {
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(l.got) < n {
			return fmt.Errorf("%d of %d", len(l.got), n)
		}
		return nil
	})
}

// end stops the load and returns what was got.
func (l *load) end(t testing.TB) keySet {
	t.Helper()
	l.cancel()
	l.ended.Wait()
	if len(l.wrong) > 0 {
		t.Errorf("%d answers were neither keys nor a 503: %v", len(l.wrong), errors.Join(l.wrong[:min(3, len(l.wrong))]...))
	}
	return l.got
}
