package qlink

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"syscall"

	"github.com/qutemail/kme/internal/secretfile"
)

// The length of a secret in bytes.
const (
	minSecret = 16
	maxSecret = 1024
)

// readSecret reads the secret of an end. It refuses a file that others may read.
func readSecret(path string) ([]byte, error) {
	b, err := secretfile.Source{File: path}.Read(maxSecret + len("\r\n"))
	if err != nil {
		return nil, fmt.Errorf("reading the secret of an end: %w", err)
	}
	secret := bytes.TrimRight(b, "\r\n")
	if len(secret) < minSecret || len(secret) > maxSecret {
		return nil, fmt.Errorf("secret %s has %d bytes: want %d to %d", path, len(secret), minSecret, maxSecret)
	}
	return secret, nil
}

// sameSecret compares in a time that tells nothing of either.
func sameSecret(a, b []byte) bool {
	x, y := sha256.Sum256(a), sha256.Sum256(b)
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}

// listen opens a local socket with mode 0600 from its first moment on. The socket
// that a killed process left behind is removed; one that somebody serves is not.
func listen(ctx context.Context, path string) (*net.UnixListener, error) {
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		// Linux gives the socket file the mode that the socket has when it is bound.
		if err := c.Control(func(fd uintptr) { chmod = syscall.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmod
	}}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("opening local socket: %w", err)
	}
	ul := l.(*net.UnixListener)
	info, err := os.Lstat(path)
	if err == nil && info.Mode().Perm() != 0o600 {
		err = fmt.Errorf("local socket %s came out with mode %v", path, info.Mode())
	}
	if err != nil {
		return nil, errors.Join(err, ul.Close())
	}
	return ul, nil
}

func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("looking for an old socket: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is in the way: it is not a socket", path)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		_ = conn.Close() // it was only to see whether somebody answers
		return fmt.Errorf("%s is served by another process", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("trying the old socket: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the old socket: %w", err)
	}
	return nil
}
