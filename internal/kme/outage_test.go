package kme

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/legacy"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
	"github.com/qutemail/kme/policies"
)

// TestOutageIsCounted: a refusal that cannot be recorded is answered 503, counted
// in a file, and told of in one summary when the database is back, by whatever
// process there is then.
func TestOutageIsCounted(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	k.Store.Close() // the database is away
	const refusals = 50
	for range refusals {
		err := k.recordOrCount(t.Context(), problem.New(problem.Unauthorized, "no"), audit.Event{Action: audit.EncKeys, Outcome: audit.Refused})
		var p *problem.Error
		if !errors.As(err, &p) || p.Kind != problem.Unavailable || p.RetryAfter != time.Second || !errors.Is(err, store.ErrUnavailable) {
			t.Fatalf("a refusal without its record: %v", err)
		}
	}
	k.summarise(t.Context()) // too early
	if n := k.outage.counted(); n != refusals {
		t.Errorf("counted %d, want %d", n, refusals)
	}

	k = s.node() // the process is another one, and the database is back
	if n := k.outage.counted(); n != refusals {
		t.Fatalf("counted after a restart: %d, want %d", n, refusals)
	}
	k.outage.count(1) // one more while the summary is on its way
	for range 3 {
		k.summarise(t.Context())
	}
	want := []told{{"outage-summary", "refused", "refused while the database was away", refusals + 1}}
	if diff := cmp.Diff(want, s.audit()); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
	if n := s.node().outage.counted(); n != 0 {
		t.Errorf("counted after the summary: %d", n)
	}
}

// TestBeatEnds: a node that looks after itself comes to the end of its looks though the
// database answers none of them, and has asked the HSM.
func TestBeatEnds(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.withToken(tokenDir(t))
	stand(t, k)
	conn, err := pgx.Connect(t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE kme.untaken, kme.compromise IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	k.hsmDown.Store("nobody has asked")
	k.beat(t.Context()) // or the test ends by its timeout
	if why := k.hsmDown.Load(); why != "" {
		t.Errorf("after a beat: the HSM is down, %v", why)
	}
}

// TestOutageFile: one number in one file, however many refusals there are.
func TestOutageFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	o, _, err := openTallies(dir)
	if err != nil {
		t.Fatal(err)
	}
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			for range 50 {
				o.count(1)
			}
		})
	}
	g.Wait()
	o.settle(80)
	if got := contents(t, dir); got["outage"] != "120\n" || len(got) != 1 {
		t.Errorf("files: %q", got)
	}

	path := filepath.Join(dir, "outage")
	for _, text := range []string{"", "twelve\n", "1e3", "99999999999999999999"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := openTallies(dir); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("outage file %q: %v, want an error that names the file", text, err)
		}
	}
}

// TestOutageIsKeptLater: what could not be written is as soon as it can, and until then
// it is known why not.
func TestOutageIsKeptLater(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	o, _, err := openTallies(dir)
	if err != nil || o.keep() != nil {
		t.Fatalf("a new one: %v, %v", err, o.keep())
	}
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	o.count(1)
	o.count(1)
	if o.counted() != 2 || o.keep() == nil {
		t.Errorf("counted %d, and kept in a folder that is not there: %v", o.counted(), o.keep())
	}
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	if err := o.keep(); err != nil || contents(t, dir)["outage"] != "2\n" {
		t.Errorf("kept: %v, %q", err, contents(t, dir))
	}
}

// TestWriteDurably: a file holds the old content or the new, and nothing else is
// left in its folder.
func TestWriteDurably(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "run")
	for i := range 3 {
		if err := writeDurably(path, fmt.Appendln(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	if got := contents(t, dir); got["run"] != "2\n" || len(got) != 1 {
		t.Errorf("files: %q", got)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode: %v, %v", st, err)
	}
	taken := filepath.Join(dir, "taken") // a folder cannot be replaced by a file
	if err := os.MkdirAll(filepath.Join(taken, "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{taken, filepath.Join(dir, "none", "run")} {
		if err := writeDurably(path, []byte("3\n")); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("writing %s: %v, want an error that names it", path, err)
		}
	}
	if got := contents(t, dir); len(got) != 2 {
		t.Errorf("files after failures: %q", got)
	}
}

// TestReaderOfAReplacedFile sees whole contents only.
func TestReaderOfAReplacedFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "run")
	if err := writeDurably(path, []byte("1\n")); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 100 {
			if err := writeDurably(path, []byte(strings.Repeat("1", i%18+1)+"\n")); err != nil {
				t.Error(err)
			}
		}
	}()
	for {
		if n, err := readNumber(path); err != nil || n == 0 {
			t.Fatalf("read %d, %v", n, err)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

// contents are the files of a folder; those of folders are "".
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for _, e := range entries {
		text, _ := os.ReadFile(filepath.Join(dir, e.Name())) // a folder has none
		files[e.Name()] = string(text)
	}
	return files
}

// TestInDoubt: a request whose commit is still under way when its caller is told 503 is
// counted in the file, for the next process if this one dies, and by nobody else until
// it is known what became of it; then the log says that.
func TestInDoubt(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	status := func() *call { return k.begin(asSAE(t, "alice", k.Now()), "r1", audit.Status, saeID(t, "bob")) }
	kept := func() string { return strings.TrimSpace(contents(t, s.data)["outage"]) }
	doubted := func(c *call) {
		t.Helper()
		c.pending = true
		if err := c.refuse(t.Context(), store.ErrDoubt); problem.KindOf(err) != problem.Unavailable || kept() != "1" || k.outage.counted() != 0 {
			t.Errorf("answered %v, kept %q, and a summary would count %d", err, kept(), k.outage.counted())
		}
		if next, _, err := openTallies(s.data); err != nil || next.counted() != 1 {
			t.Errorf("the next process would count %d, %v", next.counted(), err)
		}
	}

	conn, err := pgx.Connect(t.Context(), s.cluster.DSN(pgdev.Superuser, s.name))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "BEGIN; SELECT FROM kme.node_run FOR UPDATE"); err != nil { // no commit gets through
		t.Fatal(err)
	}
	c := status()
	done := c.ev
	done.Outcome = audit.Done
	ctx, leave := context.WithCancel(t.Context())
	answered := make(chan error, 1)
	go func() { answered <- k.Store.RecordLate(ctx, c.late, done) }()
	eventually(t, "the commit to be under way", func() bool {
		return s.ask("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()") > 0
	})
	leave()
	if err := <-answered; !errors.Is(err, store.ErrDoubt) {
		t.Fatalf("a commit that is not answered: %v", err)
	}
	doubted(c)
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the commit to be known", func() bool { return kept() == "0" })

	c = status()
	doubted(c)
	c.late(false)

	c = status()
	doubted(c)
	k.Store.Close() // its outcome is in the log, and that its caller does not know of it cannot be
	c.late(true)
	if k = s.node(); k.outage.counted() != 1 {
		t.Errorf("%d are counted, want the one whose answer the log does not tell of", k.outage.counted())
	}
	k.summarise(t.Context())
	want := []told{
		{"status", "done", "", 0},
		{"answer-lost", "failed", "committed after the caller was told 503", 0},
		{"status", "failed", "not committed in time", 0},
		{"outage-summary", "refused", "refused while the database was away", 1},
	}
	if diff := cmp.Diff(want, s.audit()); diff != "" || kept() != "0" {
		t.Errorf("%s wait, audit (-want +got):\n%s", kept(), diff)
	}
}

// TestServiceUnwell: who asks how the service is while it is not well is answered 503 by
// the old routes, and the log says so.
func TestServiceUnwell(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	k := s.node()
	k.Quota = Quota{Rate: 1e6, Burst: 1e6}
	k.Policies = func() *policies.Set { return new(policies.Set) }
	alice := asSAE(t, "alice", k.Now())
	for _, down := range []string{"", "the token is gone"} {
		k.hsmDown.Store(down)
		if got, err := k.Service(t.Context(), alice, "r1"); err != nil || (got.HSM == legacy.Connected) != (down == "") {
			t.Errorf("with an HSM that is %q: %+v, %v", down, got, err)
		}
	}
	k.Store.Close()
	if got, err := k.Service(t.Context(), alice, "r3"); err != nil || got.Database == legacy.Connected || k.outage.counted() != 1 {
		t.Errorf("without a database: %+v, %v, %d counted", got, err, k.outage.counted())
	}
	want := []told{
		{"status", "done", "", 0},
		{"status", "failed", "HSM: error: the HSM does not answer; database: connected", 0},
	}
	if diff := cmp.Diff(want, s.audit()); diff != "" {
		t.Errorf("audit (-want +got):\n%s", diff)
	}
}
