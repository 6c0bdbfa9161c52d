//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// maxPIN is far above what any token takes, in bytes.
const maxPIN = 256

// pinPath is the file that holds the PIN, and the permissions that it must not have.
func (c *Config) pinPath() (path string, forbidden fs.FileMode, err error) {
	switch {
	case (c.PINFile == "") == (c.PINCredential == ""):
		return "", 0, errors.New("reading PIN: name a file or a systemd credential, and not both")
	case c.PINFile != "":
		return c.PINFile, 0o077, nil
	case filepath.Base(c.PINCredential) != c.PINCredential:
		return "", 0, fmt.Errorf("reading PIN: %q is not the name of a systemd credential", c.PINCredential)
	}
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return "", 0, fmt.Errorf("reading PIN: credential %s: systemd has passed none (LoadCredential=)", c.PINCredential)
	}
	// systemd lets the service's user read it by an ACL, whose mask shows as the group's
	// permission; the folder is nobody else's.
	return filepath.Join(dir, c.PINCredential), 0o037, nil
}

// readPIN reads the one line of the PIN's file, unless others may do anything with
// it. The caller wipes what it gets.
func (c *Config) readPIN() ([]byte, error) {
	path, forbidden, err := c.pinPath()
	if err != nil {
		return nil, err
	}
	return readSecretLine(path, forbidden)
}

// readSecretLine reads the one line of the file at path. It refuses a file with one of
// the forbidden permissions. The caller wipes what it gets.
func readSecretLine(path string, forbidden fs.FileMode) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading PIN: %w", err)
	}
	defer f.Close()
	st, err := f.Stat() // of the open file: the name could point elsewhere by now
	if err != nil {
		return nil, fmt.Errorf("reading PIN: %w", err)
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&forbidden != 0 {
		return nil, fmt.Errorf("reading PIN: %s has mode %v: it must be a regular file that only its owner may read", path, st.Mode())
	}
	b := make([]byte, maxPIN+1) // never grown: that would leave a copy behind
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		clear(b)
		return nil, fmt.Errorf("reading PIN: %w", err)
	}
	pin := bytes.TrimRight(b[:n], "\r\n")
	if len(pin) == 0 || n > maxPIN || bytes.ContainsAny(pin, "\r\n\x00") {
		clear(b)
		return nil, fmt.Errorf("reading PIN: %s must hold one line of 1 to %d bytes", path, maxPIN-1)
	}
	return pin, nil
}
