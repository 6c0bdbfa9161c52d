package kme

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/problem"
	"github.com/qutemail/kme/internal/store"
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
