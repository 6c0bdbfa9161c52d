//go:build cgo

package hsm

import (
	"bytes"
	"fmt"
	"io"
	"os"
)

// maxPIN is far above what any token takes, in bytes.
const maxPIN = 256

// readPIN reads the first line of the file at path. It refuses a file that group
// or others may do anything with. The caller wipes what it gets.
func readPIN(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading PIN: %w", err)
	}
	defer f.Close()
	st, err := f.Stat() // of the open file: the name could point elsewhere by now
	if err != nil {
		return nil, fmt.Errorf("reading PIN: %w", err)
	}
	if !st.Mode().IsRegular() || st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("reading PIN: %s has mode %v: it must be a regular file that only its owner may read", path, st.Mode())
	}
	b, err := io.ReadAll(io.LimitReader(f, maxPIN+1))
	if err != nil {
		return nil, fmt.Errorf("reading PIN: %w", err)
	}
	pin := bytes.TrimRight(b, "\r\n")
	if len(pin) == 0 || len(b) > maxPIN || bytes.ContainsAny(pin, "\r\n\x00") {
		clear(b)
		return nil, fmt.Errorf("reading PIN: %s must hold one line of 1 to %d bytes", path, maxPIN-1)
	}
	return pin, nil
}
