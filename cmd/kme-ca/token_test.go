package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestPINFile: the file of a PIN is where its name leads from where kme-ca was started,
// not from the folder in which the authority is made.
func TestPINFile(t *testing.T) {
	t.Parallel()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for given, want := range map[string]string{"pins/sae": filepath.Join(here, "pins/sae"), "/etc/pin": "/etc/pin"} {
		c := initCommand{Module: "/usr/lib/vendor.so", Token: map[string]string{"sae": "ca"}, PINFile: map[string]string{"sae": given}}
		if got, err := c.token("sae", t.TempDir()); err != nil || got.PINFile != want {
			t.Errorf("%s is looked for at %s, want %s: %v", given, got.PINFile, want, err)
		}
	}
}
