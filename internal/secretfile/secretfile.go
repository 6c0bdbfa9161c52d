// Package secretfile reads secrets from where a configuration may say that they lie: a
// file that nobody but its owner can use, or a credential that systemd passes to its
// service. Anything else that holds a secret is refused, and the error says what to do.
package secretfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Source is where a secret lies: one of the two.
type Source struct {
	File       string // path
	Credential string // name (LoadCredential=)
}

// String names the file or the credential.
func (s Source) String() string {
	if s.File == "" {
		return "credential " + s.Credential
	}
	return s.File
}

// others are the permissions of anybody but the owner.
const others fs.FileMode = 0o077

// path is the file that holds the secret, and the permissions that it must not have.
func (s Source) path() (path string, forbidden fs.FileMode, err error) {
	switch {
	case (s.File == "") == (s.Credential == ""):
		return "", 0, errors.New("name a file or a systemd credential, and not both")
	case s.File != "":
		return s.File, others, nil
	case filepath.Base(s.Credential) != s.Credential:
		return "", 0, fmt.Errorf("%q is not the name of a systemd credential", s.Credential)
	}
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return "", 0, fmt.Errorf("credential %s: systemd has passed none (LoadCredential=)", s.Credential)
	}
	// systemd lets the service's user read it by an ACL, whose mask shows as the group's
	// permission; the folder is nobody else's.
	return filepath.Join(dir, s.Credential), 0o037, nil
}

// Path is the file that holds the secret, for a library that wants to read it by itself,
// if it is there and nobody else's.
func (s Source) Path() (string, error) {
	path, forbidden, err := s.path()
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	return path, judge(path, info, forbidden)
}

// Read returns the secret, of at most so many bytes. The caller wipes it: there is no
// other copy.
func (s Source) Read(most int) ([]byte, error) {
	path, forbidden, err := s.path()
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat() // of the open file: the name could point elsewhere by now
	if err != nil {
		return nil, err
	}
	if err := judge(path, info, forbidden); err != nil {
		return nil, err
	}
	b := make([]byte, most+1) // never grown: that would leave a copy behind
	n, err := io.ReadFull(f, b)
	switch {
	case err == nil:
		err = fmt.Errorf("%s has more than %d bytes", path, most)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return b[:n], nil
	}
	clear(b)
	return nil, err
}

// Check is nil if the file at path is there, and nobody's but its owner's.
func Check(path string) error {
	_, err := Source{File: path}.Path()
	return err
}

func judge(path string, info fs.FileInfo, forbidden fs.FileMode) error {
	if !info.Mode().IsRegular() || info.Mode().Perm()&forbidden != 0 {
		return fmt.Errorf("%s has mode %v: it must be a regular file that only its owner may read (chmod 600)", path, info.Mode())
	}
	return nil
}
