package auditlog

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/pgdev"
)

// TestBackup: what deploy/runbooks/backup.md says of pg_dump saves the whole log, which
// verifies in the database that it is restored into.
func TestBackup(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a, b, q := s.node("a"), s.node("b"), s.sequencer()
	for range 3 {
		a.requests(s, 300)
		b.requests(s, 3)
		s.step(q)
		s.clock.Add((24 * time.Hour).Milliseconds())
	}
	a.requests(s, 2) // beyond the tree

	page, err := os.ReadFile("../../deploy/runbooks/backup.md")
	if err != nil {
		t.Fatal(err)
	}
	commands := regexp.MustCompile(`(?m)^    (p(?:sql|g_dump|g_restore) .*)$`).FindAllStringSubmatch(string(page), -1)
	if len(commands) != 4 {
		t.Fatalf("the page has the commands %q", commands)
	}
	restored := &site{t: t, name: s.name + "_audit", dir: s.dir, key: s.key}
	restored.exec("postgres", "CREATE DATABASE "+restored.name)
	names := strings.NewReplacer("-d kme ", "-d "+s.name+" ", "-d kme_audit ", "-d "+restored.name+" ")
	dir := t.TempDir()
	for _, c := range commands {
		cmd := exec.CommandContext(t.Context(), "sh", "-c", names.Replace(c[1]))
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PGHOST="+filepath.Dir(cluster.Socket()), "PGPORT=5432", "PGUSER="+pgdev.Superuser)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", cmd, err, out)
		}
	}

	want, got := s.auditRows(), restored.auditRows()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rows of the tables (-saved +restored):\n%s", diff)
	}
	if want["audit"] != 2+3*303+2 || len(want) < 8+3 {
		t.Errorf("saved: %v", want)
	}
	r, err := NewReader(t.Context(), restored.dsn(pgdev.Superuser))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if report, err := restored.verify(r, nil); err != nil || report.Leaves != 2+3*303 || report.Tail != 2 {
		t.Errorf("the restored log: %+v, %v", report, err)
	}
}

// auditRows are how many rows each table of the log has, partitions among them.
func (s *site) auditRows() map[string]int {
	s.t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, s.dsn(pgdev.Superuser))
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(ctx)
	rows, _ := conn.Query(ctx, "SELECT relname FROM pg_class WHERE relnamespace = 'kme'::regnamespace AND relkind IN ('r', 'p') AND relname LIKE 'audit%'")
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		s.t.Fatal(err)
	}
	counts := make(map[string]int)
	for _, table := range tables {
		var n int
		if err := conn.QueryRow(ctx, fmt.Sprintf("SELECT count(*) FROM kme.%s", pgx.Identifier{table}.Sanitize())).Scan(&n); err != nil {
			s.t.Fatal(err)
		}
		counts[table] = n
	}
	return counts
}
