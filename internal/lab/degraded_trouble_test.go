package lab

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/etsi014"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
)

// What becomes of requests when a part is not gone but in trouble, and that all is
// well again, by itself, when the trouble is over: the rows of deploy/DEGRADED.md. One
// lab goes through it all.
func TestTrouble(t *testing.T) {
	t.Parallel()
	l := start(t, func(c *Config) {
		c.Bin = binaries(t, true)
		c.Proxy, c.Filler, c.PoolLimit = true, 2048, 6000
	})
	keysStored(t, l, 2000)
	run1, run2 := node(t, l.KM1).Run, node(t, l.KM2).Run
	for _, part := range []struct {
		name string
		test func(*testing.T, *Lab)
	}{
		{"messages twice and in another order", messagesTwice}, // first: it compares all that the audit knows
		{"peer slow", peerSlow},
		{"peer half-open", peerHalfOpen},
		{"answers of the peer lost", answersLost},
		{"way to the peer cut", peerCut},
		{"HSM slow", hsmSlow},
		{"HSM of the peer slow", peersHSMSlow},
		{"HSM fails", hsmFails},
		{"clock ahead", clockAhead},
		{"clock far ahead and back", clockSteps},
		{"disk of the database full", databaseFull},
		{"disk of the peer's database full", peersDatabaseFull},
		{"disk of the data folder full", dataFull},
		{"peer lies", peerLies}, // last: its lies take numbers of batches from the honest
	} {
		if !t.Run(part.name, func(t *testing.T) { part.test(t, l) }) {
			break // what follows would only say so again
		}
	}
	if one, two := node(t, l.KM1).Run, node(t, l.KM2).Run; one != run1 || two != run2 {
		t.Errorf("runs %d and %d, and they were %d and %d: somebody has restarted a node", one, two, run1, run2)
	}
}

// ways are both directions between the sites.
func ways(l *Lab, t Trouble) {
	l.KM1.Proxy.Set(t)
	l.KM2.Proxy.Set(t)
}

// works has keys handed over in both directions.
func works(t *testing.T, l *Lab) {
	t.Helper()
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	untilServed(t, alice, bob)
	untilServed(t, bob, alice)
	take(t, bob, alice, get(t, alice, bob, 2))
	take(t, alice, bob, get(t, bob, alice, 2))
}

// peerSlow: requests take as much longer, and go on; beyond half a second operators
// are told.
func peerSlow(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	for _, rtt := range []time.Duration{10 * time.Millisecond, 100 * time.Millisecond, time.Second} {
		ways(l, Trouble{Delay: rtt / 2})
		fastest := time.Hour
		for range 3 {
			began := time.Now()
			take(t, bob, alice, get(t, alice, bob, 1))
			fastest = min(fastest, time.Since(began))
		}
		if fastest < rtt || fastest > rtt+time.Second {
			t.Errorf("a key took %v or more over a way of %v there and back", fastest, rtt)
		}
	}
	untilAlarm(t, l.KM1, "slow-km2", true)
	ways(l, Trouble{})
	untilAlarm(t, l.KM1, "slow-km2", false)
}

// peerHalfOpen: what was announced is in doubt, everybody is refused in time, and what
// was parked is dealt with when the peer answers again.
func peerHalfOpen(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	get(t, alice, bob, 1)
	due := get(t, bob, alice, 2)
	l.KM2.Proxy.Set(Trouble{Hole: true})
	refusedInTime(t, alice, bob, 8)
	untilAlarm(t, l.KM1, "announce-km2", true)
	untilAlarm(t, l.KM1, "peer-km2", true)
	if parkedAt(t, l.KM1) == 0 {
		t.Error("no key is parked")
	}
	take(t, alice, bob, due) // assigned before
	began := time.Now()
	wantAway(t, "enc_keys while the peer is known to be silent", enc(t.Context(), alice, bob))
	if took := time.Since(began); took > noticed {
		t.Errorf("a refusal took %v", took)
	}
	l.KM2.Proxy.Set(Trouble{})
	works(t, l)
	settled(t, l)
	untilAlarm(t, l.KM1, "announce-km2", false)
	untilAlarm(t, l.KM1, "peer-km2", false)
}

// refusedInTime has clients at once be refused, each within what a request may take.
func refusedInTime(t *testing.T, master, slave *Person, clients int) {
	t.Helper()
	var all sync.WaitGroup
	for range clients {
		all.Go(func() {
			began := time.Now()
			wantAway(t, "enc_keys", enc(t.Context(), master, slave))
			if took := time.Since(began); took > requestTime+stall {
				t.Errorf("a refusal took %v, want at most %v", took, requestTime)
			}
		})
	}
	all.Wait()
}

func parkedAt(t *testing.T, s *Site) (n int) {
	t.Helper()
	sql(t, s, func(conn *pgx.Conn) error {
		return conn.QueryRow(t.Context(), "SELECT count(*) FROM kme.parked").Scan(&n)
	})
	return n
}

func sql(t *testing.T, s *Site, do func(*pgx.Conn) error) {
	t.Helper()
	conn, done, err := s.super(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if err := do(conn); err != nil {
		t.Fatal(err)
	}
}

// answersLost: the peer assigns, and is not heard: the keys are burned and voided when
// it is.
func answersLost(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	burned := recorded(t, l.KM1, `e->>'action' = 'burn'`)
	l.KM2.Proxy.Set(Trouble{Lose: true})
	refusedInTime(t, alice, bob, 1)
	untilAlarm(t, l.KM1, "announce-km2", true)
	l.KM2.Proxy.Set(Trouble{})
	works(t, l)
	settled(t, l)
	untilAlarm(t, l.KM1, "announce-km2", false)
	if recorded(t, l.KM1, `e->>'action' = 'burn'`) == burned {
		t.Error("keys that were assigned to nobody's knowledge were not burned")
	}
}

func peerCut(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	ways(l, Trouble{Cut: true})
	refusedInTime(t, alice, bob, 4)
	untilAlarm(t, l.KM1, "peer-km2", true)
	untilAlarm(t, l.KM2, "peer-km1", true)
	ways(l, Trouble{})
	works(t, l)
	settled(t, l)
	untilAlarm(t, l.KM1, "peer-km2", false)
}

// messagesTwice: whatever arrives twice, late or in another order, nothing is handed
// out twice and nothing is lost.
func messagesTwice(t *testing.T, l *Lab) {
	ways(l, Trouble{Twice: true, Swap: true})
	f := begin(t, l)
	for range 4 {
		f.flows(t)
	}
	ways(l, Trouble{})
	f.flows(t)
	f.close(t)
}

// hsmSlow: requests for a key take as much longer, those that cannot end in time are
// refused and give back what they had, and nothing piles up.
func hsmSlow(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	get(t, alice, bob, 1)
	quiet := threads(t, l.KM1)
	faults(t, l.KM1, "hsm 400ms")
	untilAlarm(t, l.KM1, "hsm-slow", true)
	began := time.Now()
	take(t, bob, alice, get(t, alice, bob, 1))
	if took := time.Since(began); took < 400*time.Millisecond {
		t.Errorf("a key took %v: the HSM is not slow", took)
	}
	before := stored(t, alice, bob)
	var all sync.WaitGroup
	for range 32 {
		all.Go(func() {
			began := time.Now()
			_, err := alice.Client.EncKeys(t.Context(), bob.ID, etsi014.KeyRequest{Number: 20})
			wantAway(t, "enc_keys of 20 keys", err)
			if took := time.Since(began); took > requestTime+stall {
				t.Errorf("a refusal took %v, want about %v", took, requestTime)
			}
		})
	}
	all.Wait()
	if n := stored(t, alice, bob); n != before {
		t.Errorf("%d keys are stored, and %d were: the refusals have consumed some", n, before)
	}
	if n := threads(t, l.KM1); n > quiet+16 {
		t.Errorf("%d threads, and %d before the HSM was slow", n, quiet)
	}
	faults(t, l.KM1)
	works(t, l)
	untilAlarm(t, l.KM1, "hsm-slow", false)
}

// threads are those of the site's kmed.
func threads(t *testing.T, s *Site) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.kmed.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if n, ok := strings.CutPrefix(line, "Threads:"); ok {
			threads, err := strconv.Atoi(strings.TrimSpace(n))
			if err != nil {
				t.Fatal(err)
			}
			return threads
		}
	}
	t.Fatal("no number of threads")
	return 0
}

func faults(t *testing.T, s *Site, lines ...string) {
	t.Helper()
	if err := s.Faults(lines...); err != nil {
		t.Fatal(err)
	}
}

// peersHSMSlow: announces are not answered in time, and settled when they are.
func peersHSMSlow(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	faults(t, l.KM2, "hsm 1500ms")
	untilAlarm(t, l.KM2, "hsm-slow", true)
	refusedInTime(t, alice, bob, 4)
	faults(t, l.KM2)
	works(t, l)
	settled(t, l)
	untilAlarm(t, l.KM2, "hsm-slow", false)
}

func hsmFails(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	due := get(t, bob, alice, 1)
	faults(t, l.KM1, "hsm error")
	untilAlarm(t, l.KM1, "hsm", true)
	before := stored(t, alice, bob)
	wantAway(t, "enc_keys", enc(t.Context(), alice, bob))
	_, err := alice.Client.DecKeys(t.Context(), bob.ID, due.ids())
	wantAway(t, "dec_keys", err)
	if n := stored(t, alice, bob); n != before {
		t.Errorf("%d keys are stored, and %d were: the refusals have consumed some", n, before)
	}
	faults(t, l.KM1)
	works(t, l)
	take(t, alice, bob, due)
	untilAlarm(t, l.KM1, "hsm", false)
}

// clockAhead: operators of both sites are told, and all goes on.
func clockAhead(t *testing.T, l *Lab) {
	faults(t, l.KM1, "clock 2s")
	untilAlarm(t, l.KM1, "clock-km2", true)
	untilAlarm(t, l.KM2, "clock-km1", true)
	works(t, l)
	faults(t, l.KM1, "clock -2s")
	works(t, l)
	faults(t, l.KM1)
	untilAlarm(t, l.KM1, "clock-km2", false)
	untilAlarm(t, l.KM2, "clock-km1", false)
}

// clockSteps: no blocks are made by clocks that differ by more than 30 s, and keys
// flow. What a clock two epochs ahead has ended has ended for good, and what was
// assigned by it lives as long as anything.
func clockSteps(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	old := get(t, bob, alice, 2) // alice has an hour for them, by the clock of KM1
	expired := recorded(t, l.KM1, `e->>'action' = 'expire'`)
	for _, step := range []string{"clock 40s", "clock -40s", "clock 2h"} {
		faults(t, l.KM1)
		untilAlarm(t, l.KM1, "clock-km2", false) // so that the next one is of this step: a step in the midst of works ends its keys
		faults(t, l.KM1, step)
		untilAlarm(t, l.KM1, "clock-km2", true)
		untilLink(t, l.KM1, "paused")
		works(t, l)
	}
	eventually(t, "the old keys to expire", func(context.Context) error {
		if n := recorded(t, l.KM1, `e->>'action' = 'expire'`); n == expired {
			return errors.New("not yet")
		}
		return nil
	})
	ahead := get(t, bob, alice, 2)
	theirs := get(t, alice, bob, 2)
	faults(t, l.KM1)
	untilAlarm(t, l.KM1, "clock-km2", false)
	_, err := alice.Client.DecKeys(t.Context(), bob.ID, old.ids())
	if answer, ok := errors.AsType[*etsi014.APIError](err); !ok || answer.Status != 400 {
		t.Errorf("keys that had expired are answered %v", err)
	}
	take(t, alice, bob, ahead)
	take(t, bob, alice, theirs)
	works(t, l)
	eventually(t, "the link to make blocks, or be full", func(ctx context.Context) error {
		if now, err := link(ctx, operator(t, l.KM1)); err != nil || now.State == "paused" {
			return fmt.Errorf("the link is %s (%s): %w", now.State, now.Why, err)
		}
		return nil
	})
}

func untilLink(t *testing.T, s *Site, state string) {
	t.Helper()
	eventually(t, "link "+state, func(ctx context.Context) error {
		now, err := link(ctx, operator(t, s))
		if err == nil && now.State != state {
			err = fmt.Errorf("the link is %s (%s)", now.State, now.Why)
		}
		return err
	})
}

// limitFiles has processes write no file beyond so many bytes: what lies there can be
// read, and no more be written, as on a full disk. It is done as the processes' own
// user, who may, unlike a root without capabilities.
func limitFiles(t *testing.T, bytes string, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		info, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		if err != nil {
			continue // it has ended
		}
		cmd := exec.Command("prlimit", "--pid", strconv.Itoa(pid), "--fsize="+bytes+":")
		if owner := info.Sys().(*syscall.Stat_t); int(owner.Uid) != os.Geteuid() {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: owner.Uid, Gid: owner.Gid}}
		}
		if said, err := cmd.CombinedOutput(); err != nil && syscall.Kill(pid, 0) == nil {
			t.Fatalf("limiting the files of process %d: %v: %s", pid, err, said)
		}
	}
}

// postgres are the processes of the site's database.
func postgres(t *testing.T, s *Site) []int {
	t.Helper()
	pids := []int{s.pg.Pid()}
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, _ := os.ReadFile(file) // it may have ended
		var pid, parent int
		var state string
		if i := strings.LastIndexByte(string(text), ')'); i > 0 {
			_, _ = fmt.Sscan(string(text[i+1:]), &state, &parent)
			_, _ = fmt.Sscan(string(text), &pid)
		}
		if parent == s.pg.Pid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// walSegment is the size of the files that the database's log is made of, beforehand.
const walSegment = "16777216"

// fill makes the files of the site's audit as large as those of the log by rows that are
// taken back, and then has the database write no file beyond that.
func fill(t *testing.T, s *Site) (empty func()) {
	t.Helper()
	sql(t, s, func(conn *pgx.Conn) error {
		today := "kme.audit_d" + time.Now().UTC().Format("20060102")
		if _, err := conn.Exec(t.Context(), "ALTER TABLE "+today+" SET (autovacuum_enabled = false)"); err != nil { // it would shrink it again
			return err
		}
		tx, err := conn.Begin(t.Context())
		if err != nil {
			return err
		}
		_, err = tx.Exec(t.Context(), `INSERT INTO `+today+` (day, node, seq, prev, body, at) SELECT day, 'nobody', n, prev, repeat('x', 1500), at
			FROM (SELECT * FROM `+today+` LIMIT 1) a, generate_series(1, 14000) n`)
		return errors.Join(err, tx.Rollback(t.Context()))
	})
	limitFiles(t, walSegment, postgres(t, s)...)
	empty = func() { limitFiles(t, "unlimited", postgres(t, s)...) }
	t.Cleanup(empty)
	return empty
}

// databaseFull: the first request learns it, at the cost of its keys; the others are
// refused before they cost any.
func databaseFull(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	due := get(t, bob, alice, 2)
	empty := fill(t, l.KM1)
	untilAway(t, alice, bob)
	untilAlarm(t, l.KM1, "database", true)
	before, began := peerBatches(t, l), time.Now()
	for range 5 {
		wantAway(t, "enc_keys", enc(t.Context(), alice, bob))
		_, err := alice.Client.DecKeys(t.Context(), bob.ID, due.ids())
		wantAway(t, "dec_keys", err)
		wantAway(t, "enc_keys at the peer", enc(t.Context(), bob, alice))
	}
	if n := peerBatches(t, l); n > before+2+int64(time.Since(began)/time.Second) { // one a second, if there is room for an event and none for more
		t.Errorf("the peer was announced %d batches by a KME that cannot commit", n-before)
	}
	empty()
	untilAlarm(t, l.KM1, "database", false)
	works(t, l)
	take(t, alice, bob, due)
	settled(t, l)
}

// peerBatches is the number of the last batch of KM1 that KM2 knows.
func peerBatches(t *testing.T, l *Lab) (last int64) {
	t.Helper()
	sql(t, l.KM2, func(conn *pgx.Conn) error {
		return conn.QueryRow(t.Context(), "SELECT last FROM kme.peer_run WHERE node = $1", l.KM1.Node.Name).Scan(&last)
	})
	return last
}

func peersDatabaseFull(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	empty := fill(t, l.KM2)
	untilAway(t, alice, bob)
	untilAlarm(t, l.KM2, "database", true)
	wantAway(t, "enc_keys", enc(t.Context(), alice, bob))
	empty()
	untilAlarm(t, l.KM2, "database", false)
	works(t, l)
	settled(t, l)
}

// dataFull: a node whose data folder takes nothing goes on; what it must keep there is
// kept in memory until it can.
func dataFull(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	const summary = `e->>'action' = 'outage-summary'`
	summaries := recorded(t, l.KM1, summary)
	limitFiles(t, "0", l.KM1.kmed.cmd.Process.Pid)
	works(t, l)
	if err := l.KM1.StopDatabase(); err != nil {
		t.Fatal(err)
	}
	untilAlarm(t, l.KM1, "database", true)
	wantAway(t, "enc_keys", enc(t.Context(), alice, bob))
	untilAlarm(t, l.KM1, "data", true)
	if err := l.KM1.StartDatabase(t.Context()); err != nil {
		t.Fatal(err)
	}
	works(t, l)
	limitFiles(t, "unlimited", l.KM1.kmed.cmd.Process.Pid)
	untilAlarm(t, l.KM1, "data", false)
	eventually(t, "a summary of what was refused", func(context.Context) error {
		if n := recorded(t, l.KM1, summary); n == summaries {
			return errors.New("none")
		}
		return nil
	})
}

// peerLies: a KME with KM1's own certificate asks for what is not KM1's to have. All of
// it is refused alone, recorded and an alarm; nothing is assigned or taken back.
func peerLies(t *testing.T, l *Lab) {
	alice, bob := sae(t, l, "alice"), sae(t, l, "bob")
	honest := get(t, alice, bob, 2)
	cfg, err := l.KM2.Proxy.clientTLS()
	if err != nil {
		t.Fatal(err)
	}
	liar, err := peer.NewClient(peer.ClientConfig{Addresses: []string{l.KM2.Proxy.behind(0)}, TLS: cfg, Still: func(*x509.Certificate) error { return nil }, Log: l.Log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(liar.Close)
	refused := func(what string, err error) {
		t.Helper()
		if _, ok := errors.AsType[*peer.Refused](err); !ok {
			t.Errorf("%s: %v, want it refused", what, err)
		}
	}
	hello := handover.Hello{KME: l.KM2.KME(), Node: l.KM1.Node.Name, Run: node(t, l.KM1).Run, Clock: time.Now().UnixMilli()}
	_, err = liar.Hello(t.Context(), hello)
	refused("a hello of another", err)
	_, err = liar.Run(t.Context(), handover.RunStarted{Node: "km1-z", Run: 1})
	refused("a run of a node that there is not", err)
	_, err = liar.Held(t.Context(), handover.Held{BlockRef: handover.BlockRef{Link: "another", Session: 1}, Atoms: 1, Owners: "a"})
	refused("a block of a link that is not its", err)

	mine, theirs := pooledAtKM2(t, l, "peer"), pooledAtKM2(t, l, "here")
	ok := handover.Request{Link: linkID, Master: alice.ID, Slaves: []identity.SAE{bob.ID}, Bits: key.AtomBits, TTL: 60_000}
	requests := make([]handover.Request, 7)
	for i := range requests {
		requests[i] = ok
		requests[i].ID = strconv.Itoa(i)
		requests[i].Keys = []handover.Key{mine[i]}
	}
	requests[0].Keys = []handover.Key{theirs[0]}            // of a chunk that KM2 owns
	requests[1].Master = bob.ID                             // not homed at KM1
	requests[2].Slaves = []identity.SAE{alice.ID}           // not homed at KM2
	requests[3].Slaves = []identity.SAE{SAEID("carol")}     // whom no policy allows
	requests[4].TTL = (200 * 24 * time.Hour).Milliseconds() // longer than anything lives
	requests[5].Keys[0].First++                             // where it does not lie
	requests[6].Keys[0].Session++                           // nor there
	batch := handover.Announce{Node: l.KM1.Node.Name, Run: hello.Run, Batch: peerBatches(t, l) + 1, Requests: requests}
	answer, err := liar.Announce(t.Context(), batch)
	if err != nil || answer.Standing != handover.Fresh || len(answer.Results) != len(requests) {
		t.Fatalf("the lies are answered %+v, %v", answer, err)
	}
	for i, r := range answer.Results {
		if r.Accepted {
			t.Errorf("lie %d was believed", i)
		}
	}
	untilAlarm(t, l.KM2, "refused-km1", true)
	if err := liar.Void(t.Context(), handover.Void{Node: batch.Node, Run: batch.Run, Batch: batch.Batch, Keys: honest.ids()}); err != nil {
		t.Errorf("a void of keys of another batch: %v, want it answered and nothing done", err)
	}
	take(t, bob, alice, honest)
	works(t, l)
	settled(t, l)
}

// pooledAtKM2 are keys of one atom in the pool at KM2 that nobody has been promised, of
// chunks with that owner, the youngest first.
func pooledAtKM2(t *testing.T, l *Lab, owner string) (keys []handover.Key) {
	t.Helper()
	sql(t, l.KM2, func(conn *pgx.Conn) error {
		rows, err := conn.Query(t.Context(), `SELECT c.session, c.block, k.index, k.id FROM kme.key k JOIN kme.chunk c ON c.id = k.chunk
			WHERE c.owner = $1 ORDER BY c.id DESC, k.index DESC LIMIT 10`, owner)
		if err != nil {
			return err
		}
		var k handover.Key
		var id [16]byte
		_, err = pgx.ForEachRow(rows, []any{&k.Session, &k.Block, &k.First, &id}, func() error {
			kept := k
			kept.Atoms = []key.ID{id}
			keys = append(keys, kept)
			return nil
		})
		return err
	})
	if len(keys) < 10 {
		t.Fatalf("%d atoms whose owner is %s", len(keys), owner)
	}
	return keys
}
