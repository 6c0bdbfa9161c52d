package pgdev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const (
	socketName    = ".s.PGSQL.5432"
	maxSocketPath = 107 // sockaddr_un's 108 bytes less the final zero
)

// binaries finds the folder of initdb and postgres: PG_BIN, pg_config, Debian's
// folders (the newest version), PATH.
func binaries(ctx context.Context) (string, error) {
	var folders []string
	if dir := os.Getenv("PG_BIN"); dir != "" {
		folders = append(folders, dir)
	}
	if out, err := exec.CommandContext(ctx, "pg_config", "--bindir").Output(); err == nil {
		folders = append(folders, strings.TrimSpace(string(out)))
	}
	if newest := newestDebian(); newest != "" {
		folders = append(folders, newest)
	}
	if path, err := exec.LookPath("initdb"); err == nil {
		folders = append(folders, filepath.Dir(path))
	}
	for _, dir := range folders {
		if executable(dir, "initdb") && executable(dir, "postgres") {
			return filepath.Abs(dir)
		}
	}
	return "", errors.New("no initdb and postgres found: install postgresql (apt install postgresql) or set PG_BIN")
}

func newestDebian() string {
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin") // the pattern is good
	best, newest := -1, ""
	for _, dir := range dirs {
		v, err := strconv.Atoi(filepath.Base(filepath.Dir(dir)))
		if err == nil && v > best && executable(dir, "postgres") {
			best, newest = v, dir
		}
	}
	return newest
}

func executable(dir, name string) bool {
	info, err := os.Stat(filepath.Join(dir, name))
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// serverUser is whom the server runs as: nil for the calling user, or, since
// postgres refuses to run as root, the user postgres or nobody.
func serverUser() (*syscall.Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, errU := strconv.ParseUint(u.Uid, 10, 32)
		gid, errG := strconv.ParseUint(u.Gid, 10, 32)
		if errU == nil && errG == nil && uid != 0 {
			return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
		}
	}
	return nil, errors.New("running as root, and there is no user postgres or nobody to run the server as")
}

// environment is what the server sees of ours: nothing that could redirect it.
func environment() []string {
	return []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TZ=UTC"}
}

// place returns the resolved folder of the cluster, with its folder for the
// socket, making it where the server can use it.
func place(dir, bin string, cred *syscall.Credential) (string, error) {
	link := filepath.Join(dir, "cluster")
	home, err := filepath.EvalSymlinks(link)
	switch {
	case err == nil:
		if err := checkPrivate(home, cred); err != nil {
			return "", err
		}
	case !errors.Is(err, os.ErrNotExist):
		return "", err
	case isLink(link):
		return "", fmt.Errorf("%s leads nowhere: its data, in a temporary folder, are gone; delete %s to begin anew", link, dir)
	default:
		if home, err = makePlace(dir, link, bin, cred); err != nil {
			return "", err
		}
	}
	return home, makePrivate(filepath.Join(home, "run"), cred)
}

func makePlace(dir, link, bin string, cred *syscall.Credential) (string, error) {
	near, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", err
	}
	near = filepath.Join(near, "cluster")
	if fits(near) {
		if err := makePrivate(near, cred); err != nil {
			return "", err
		}
		if reaches(near, bin, cred) {
			return near, nil
		}
		if err := os.Remove(near); err != nil {
			return "", err
		}
	}
	sweep(cred)
	for _, parent := range []string{os.TempDir(), "/tmp"} {
		far, err := os.MkdirTemp(parent, farName)
		if err != nil {
			return "", err
		}
		if far, err = filepath.EvalSymlinks(far); err != nil {
			return "", err
		}
		if err := makePrivate(far, cred); err != nil {
			return "", err
		}
		if fits(far) && reaches(far, bin, cred) {
			if err := os.Symlink(far, link); err != nil {
				return "", err
			}
			return far, os.WriteFile(filepath.Join(far, farNote), []byte(dir), 0o600)
		}
		if err := os.Remove(far); err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("the server cannot use %s, and no temporary folder either: path over %d bytes or not reachable", near, maxSocketPath)
}

// Of a cluster's folder under the temporary directory: how its name begins, and
// the file in it that names the folder it is linked from.
const (
	farName = "kme-pg-"
	farNote = "linked-from"
)

// sweep deletes clusters under the temporary directory whose folder lay there too
// and is gone: a test's, which deleted only what it knew of.
func sweep(cred *syscall.Credential) {
	tmp := os.TempDir()
	fars, _ := filepath.Glob(filepath.Join(tmp, farName+"*")) // a bad pattern finds nothing
	for _, far := range fars {
		dir, err := os.ReadFile(filepath.Join(far, farNote))
		if err != nil || !strings.HasPrefix(string(dir), tmp+string(filepath.Separator)) || checkPrivate(far, cred) != nil {
			continue
		}
		if _, err := os.Lstat(string(dir)); errors.Is(err, os.ErrNotExist) && len(inFolder(filepath.Join(far, "data"))) == 0 {
			_ = os.RemoveAll(far) // the next sweep tries again
		}
	}
}

func fits(home string) bool {
	return len(filepath.Join(home, "run", socketName)) <= maxSocketPath
}

// reaches says whether the server's user can enter home: it runs a program there.
func reaches(home, bin string, cred *syscall.Credential) bool {
	cmd := exec.Command(filepath.Join(bin, "postgres"), "--version")
	cmd.Dir, cmd.Env = home, environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	return cmd.Run() == nil
}

func makePrivate(dir string, cred *syscall.Credential) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if cred != nil {
		if err := os.Chown(dir, int(cred.Uid), int(cred.Gid)); err != nil {
			return err
		}
	}
	return os.Chmod(dir, 0o700)
}

// checkPrivate refuses a folder that somebody else might have put there.
func checkPrivate(home string, cred *syscall.Credential) error {
	info, err := os.Stat(home)
	if err != nil {
		return err
	}
	want := uint32(os.Geteuid())
	if cred != nil {
		want = cred.Uid
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() || info.Mode().Perm()&0o077 != 0 || st.Uid != want {
		return fmt.Errorf("%s is not a folder that is private to user %d", home, want)
	}
	return nil
}

func isLink(path string) bool {
	info, err := os.Lstat(path)
	return err == nil && info.Mode()&os.ModeSymlink != 0
}

// tail is the end of a program's output, for an error.
func tail(out []byte) string {
	const most = 800
	return strings.TrimSpace(string(out[max(0, len(out)-most):]))
}
