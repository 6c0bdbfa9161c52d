package kme

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
)

// newSiteApart is a site with a Postgres of its own, which can be backed up.
func newSiteApart(t testing.TB) *site {
	t.Helper()
	s := &site{t: t, self: "km1", name: "kme", data: t.TempDir(), clock: newClock()}
	s.cluster = s.start(s.folder())
	err := s.cluster.EnsureDatabase(t.Context(), s.name)
	if err == nil {
		err = store.Migrate(t.Context(), s.cluster.DSN(pgdev.Superuser, s.name), time.Hour, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// folder makes one that the server's user can pass through, with a short name: of a
// cluster, or of the parts of one.
func (s *site) folder() string {
	s.t.Helper()
	dir, err := os.MkdirTemp("", "kme-core-")
	if err == nil {
		err = os.Chmod(dir, 0o711)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			s.t.Error(err)
		}
	})
	return dir
}

func (s *site) start(dir string) *pgdev.Cluster {
	s.t.Helper()
	c, err := pgdev.Start(s.t.Context(), pgdev.Config{Dir: dir})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		if err := errors.Join(c.Kill(), c.Remove()); err != nil {
			s.t.Error(err)
		}
	})
	return c
}

// tool runs one of the system's.
func (s *site) tool(name string, args ...string) {
	s.t.Helper()
	if out, err := exec.CommandContext(s.t.Context(), name, args...).CombinedOutput(); err != nil {
		s.t.Fatalf("%s %q: %v: %s", name, args, err, out)
	}
}

// baseBackup makes a base backup of the site's cluster, as an administrator does, and has
// the cluster keep its WAL from then on. It returns the backup's folder.
func (s *site) baseBackup() string {
	s.t.Helper()
	s.exec(s.name, "SELECT pg_create_physical_replication_slot('backups', true)")
	dir := s.folder()
	s.tool("pg_basebackup", "-d", s.cluster.DSN(pgdev.Superuser, s.name), "-D", filepath.Join(dir, "cluster", "data"), "-X", "none", "-c", "fast", "--no-sync")
	return dir
}

// restored is the site as it was at a restore point: another cluster, of a base backup
// and the WAL since. No node runs there.
func (s *site) restored(base, point string) *site {
	s.t.Helper()
	live, err := filepath.EvalSymlinks(filepath.Join(filepath.Dir(filepath.Dir(s.cluster.Socket())), "data"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.exec(s.name, "SELECT pg_switch_wal()")
	wal, data := filepath.Join(base, "wal"), filepath.Join(base, "cluster", "data")
	s.tool("cp", "-r", filepath.Join(live, "pg_wal"), wal)
	settings := fmt.Sprintf("restore_command = 'cp %s/%%f %%p'\nrecovery_target_name = '%s'\nrecovery_target_action = 'promote'\n", wal, point)
	err = errors.Join(
		os.WriteFile(filepath.Join(data, "postgresql.auto.conf"), []byte(settings), 0o600),
		os.WriteFile(filepath.Join(data, "recovery.signal"), nil, 0o600),
	)
	if err != nil {
		s.t.Fatal(err)
	}
	s.tool("chown", "-R", "--reference", live, wal, filepath.Join(base, "cluster"))
	s.tool("chmod", "700", filepath.Join(base, "cluster"))
	old := *s
	old.cluster = s.start(base)
	eventually(s.t, "the WAL to be replayed", func() (done bool) {
		conn, err := pgx.Connect(s.t.Context(), old.cluster.DSN(pgdev.Superuser, s.name))
		if err != nil {
			return false
		}
		defer conn.Close(s.t.Context())
		return conn.QueryRow(s.t.Context(), "SELECT NOT pg_is_in_recovery()").Scan(&done) == nil && done
	})
	return &old
}
