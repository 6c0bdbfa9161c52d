//go:build cgo

package hsm

import (
	"bytes"
	"fmt"

	"github.com/qutemail/kme/internal/secretfile"
)

// maxPIN is far above what any token takes, in bytes.
const maxPIN = 256

// pin is where the PIN lies.
func (c *Config) pin() secretfile.Source {
	return secretfile.Source{File: c.PINFile, Credential: c.PINCredential}
}

// readPIN reads the PIN: the one line of its file. The caller wipes what it gets.
func readPIN(from secretfile.Source) ([]byte, error) {
	b, err := from.Read(maxPIN)
	if err != nil {
		return nil, fmt.Errorf("reading PIN: %w", err)
	}
	pin := bytes.TrimRight(b, "\r\n")
	if len(pin) == 0 || bytes.ContainsAny(pin, "\r\n\x00") {
		clear(b)
		return nil, fmt.Errorf("reading PIN: %s must hold one line, which is not empty", from)
	}
	return pin, nil
}
