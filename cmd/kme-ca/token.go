package main

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/pki/authority"
)

// softHSMDir is the folder of an authority's own SoftHSM, within its directory: tokens,
// configuration and PIN.
const softHSMDir = "hsm"

// token makes the token of owner, with SoftHSM, or names the one that is there.
func (c *initCommand) token(owner, dir string) (authority.HSMToken, error) {
	t := authority.HSMToken{Module: c.Module, Label: c.Token[owner]}
	if file := c.PINFile[owner]; t.Label != "" && file != "" {
		var err error
		t.PINFile, err = filepath.Abs(file)
		return t, err
	}
	if !strings.Contains(filepath.Base(c.Module), "softhsm") {
		return t, fmt.Errorf("--token %s=LABEL and --pin-file %s=FILE are missing: %s makes no tokens by itself", owner, owner, c.Module)
	}
	if err := os.Mkdir(filepath.Join(dir, softHSMDir), 0o700); err != nil {
		return t, err
	}
	if err := useSoftHSM(dir); err != nil {
		return t, err
	}
	t.Label, t.PINFile = "kme-ca-"+owner, filepath.Join(softHSMDir, "pin")
	pin, soPIN := rand.Text(), rand.Text()
	if err := hsm.InitToken(c.Module, t.Label, soPIN, pin); err != nil {
		return t, err
	}
	if err := os.WriteFile(filepath.Join(dir, softHSMDir, "so-pin"), []byte(soPIN+"\n"), 0o600); err != nil {
		return t, err
	}
	return t, os.WriteFile(filepath.Join(dir, t.PINFile), []byte(pin+"\n"), 0o600)
}

// useSoftHSM has SoftHSM find the tokens in an authority's directory, wherever that has
// been moved. It does nothing where there are none.
func useSoftHSM(dir string) error {
	home := filepath.Join(dir, softHSMDir)
	if _, err := os.Stat(home); os.IsNotExist(err) {
		return nil
	}
	conf, err := hsm.WriteSoftHSMConfig(home)
	if err != nil {
		return err
	}
	return os.Setenv("SOFTHSM2_CONF", conf)
}
