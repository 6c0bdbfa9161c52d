package auditlog

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
)

// standIns are users that every Debian has, in the place of those of
// deploy/systemd/sysusers.conf.
var standIns = map[string]string{"kmed": "daemon", "kme-seq": "sys", "another": "games"}

// TestUsers: with the files of deploy/postgres a user of the operating system is its
// own role of the database, and no other. Only root can be several users.
func TestUsers(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("only root can be several users, as this must: CI is")
	}
	c := ownCluster(t)
	// The line that lets them in has no other before it, and none after it: who is not
	// mapped is nobody here.
	data := filepath.Join(filepath.Dir(filepath.Dir(c.Socket())), "data")
	for _, name := range []string{"pg_hba.conf", "pg_ident.conf"} {
		text, err := os.ReadFile(filepath.Join("../../deploy/postgres", name))
		if err != nil {
			t.Fatal(err)
		}
		said := string(text)
		for is, standIn := range standIns {
			said = strings.ReplaceAll(said, " "+is+" ", " "+standIn+" ")
		}
		if err := os.WriteFile(filepath.Join(data, name), []byte(said), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := pgx.Connect(t.Context(), c.DSN(pgdev.Superuser, "kme"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	roles := []string{store.OwnerRole, store.AppRole, store.AuditorRole, store.SequencerRole}
	for _, role := range roles {
		if _, err := conn.Exec(t.Context(), "CREATE ROLE "+role+" LOGIN"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Exec(t.Context(), "SELECT pg_reload_conf()"); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for as(t, c, "root", store.AppRole) == nil { // whom pgdev trusts
		select {
		case <-tick.C:
		case <-late:
			t.Fatal("the rules are not in force")
		}
	}
	reachable(t, c)

	for who, may := range map[string]map[string]bool{
		"kmed":    {store.AppRole: true, store.AuditorRole: true},
		"kme-seq": {store.SequencerRole: true},
		"another": {},
		"root":    {},
	} {
		for _, role := range append(roles, pgdev.Superuser) {
			err := as(t, c, who, role)
			if may[role] && err != nil {
				t.Errorf("%s cannot be %s: %v", who, role, err)
			}
			if !may[role] && (err == nil || !strings.Contains(err.Error(), "eer authentication failed")) {
				t.Errorf("%s as %s: %v", who, role, err)
			}
		}
	}
}

// ownCluster is a Postgres with an empty database.
func ownCluster(t *testing.T) *pgdev.Cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "kme-users-test-")
	if err != nil {
		t.Fatal(err)
	}
	c, err := pgdev.Start(t.Context(), pgdev.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(c.Kill(), c.Remove(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	err = c.EnsureDatabase(t.Context(), "kme")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// reachable lets everybody come to the socket, as a Postgres of Debian does.
func reachable(t *testing.T, c *pgdev.Cluster) {
	t.Helper()
	err := os.Chmod(c.Socket(), 0o777)
	for dir := filepath.Dir(c.Socket()); err == nil && dir != filepath.Clean(os.TempDir()) && dir != "/"; dir = filepath.Dir(dir) {
		err = os.Chmod(dir, 0o711)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// as asks the database for a row as a user of the operating system and a role.
func as(t *testing.T, c *pgdev.Cluster, who, role string) error {
	t.Helper()
	name := who
	if standIn := standIns[who]; standIn != "" {
		name = standIn
	}
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.ParseUint(u.Uid, 10, 32)
	gid, _ := strconv.ParseUint(u.Gid, 10, 32)
	programs, _ := filepath.Glob("/usr/lib/postgresql/*/bin/psql")
	if len(programs) == 0 {
		t.Fatal("there is no psql")
	}
	cmd := exec.CommandContext(t.Context(), programs[0], "-X", "-d", c.DSN(role, "kme"), "-c", "SELECT")
	cmd.Dir, cmd.Env = "/", []string{"LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	if out, err := cmd.CombinedOutput(); err != nil {
		return errors.New(strings.TrimSpace(string(out)))
	}
	return nil
}
