package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/qutemail/kme/hsm"
)

// hsmCommands are the key ceremony of hsm/README.md, and what an operator asks the
// token by hand.
type hsmCommands struct {
	Init       hsmInit       `cmd:"" help:"Make a token, with random PINs in new files."`
	Status     hsmStatus     `cmd:"" help:"Show the token and every key in it, and say what is wrong with it."`
	Selftest   hsmSelftest   `cmd:"" help:"Show that a module does everything that kmed needs of it."`
	AuthSecret hsmAuthSecret `cmd:"" help:"The secret with which the two ends of a link authenticate each other at first."`
}

type hsmInit struct {
	Module    string `required:"" type:"path" placeholder:"FILE" help:"The vendor's PKCS#11 library."`
	Token     string `required:"" placeholder:"LABEL" help:"Label of the token to be made; no other may have it."`
	PINFile   string `required:"" type:"path" placeholder:"FILE" name:"pin-file" help:"Where the user PIN is, or will be: a random one is made if there is none."`
	SOPINFile string `required:"" type:"path" placeholder:"FILE" name:"so-pin-file" help:"Likewise the security officer's PIN, which can erase the token."`
}

// tokenFlags say which token.
type tokenFlags struct {
	Config         string `type:"existingfile" placeholder:"FILE" xor:"which" required:"" help:"Configuration file of the node whose token it is."`
	Module         string `type:"path" placeholder:"FILE" xor:"which" required:"" help:"Instead: the PKCS#11 library, with the other flags."`
	ModuleArgs     string `placeholder:"TEXT" help:"What the library is initialised with, if it wants something (NSS: configdir=...)."`
	Token          string `placeholder:"LABEL" help:"Label of the token."`
	Serial         string `placeholder:"SERIAL" help:"Serial number of the token."`
	PINFile        string `type:"path" placeholder:"FILE" name:"pin-file" help:"File with the user PIN."`
	WeakAttributes bool   `help:"Accept a library that cannot restrict what a key is used for."`
}

type hsmStatus struct {
	tokenFlags
}

type hsmSelftest struct {
	tokenFlags
	RetryPIN bool `name:"retry-pin" help:"Log in, once, with a PIN that was refused before: after somebody has seen to the token."`
}

type hsmAuthSecret struct {
	Make    authSecretMake    `cmd:"" help:"Make one, keep it in the token, and write it to a file for the other end."`
	Import  authSecretImport  `cmd:"" help:"Keep in the token what the other end has made."`
	Show    authSecretShow    `cmd:"" help:"Show the check value, by which both ends see that they have the same."`
	Destroy authSecretDestroy `cmd:"" help:"Destroy it in the token: before another one is made, or when it is not needed any more."`
}

type authSecretMake struct {
	tokenFlags
	Link string `required:"" placeholder:"LINK" help:"ID of the link, as in network.yaml."`
	Out  string `required:"" type:"path" placeholder:"FILE" help:"New file for the secret. It goes to the other end by hand, and is destroyed then."`
}

type authSecretImport struct {
	tokenFlags
	Link string `required:"" placeholder:"LINK" help:"ID of the link, as in network.yaml."`
	In   string `required:"" type:"existingfile" placeholder:"FILE" help:"File with the secret."`
}

type authSecretShow struct {
	tokenFlags
	Link string `required:"" placeholder:"LINK" help:"ID of the link, as in network.yaml."`
}

type authSecretDestroy struct {
	tokenFlags
	Link string `required:"" placeholder:"LINK" help:"ID of the link, as in network.yaml."`
}

// token is the configuration of the token that the flags name.
func (f tokenFlags) token(log *slog.Logger) (hsm.Config, error) {
	if f.Config != "" {
		cfg, err := LoadConfig(f.Config, Environment{})
		if err != nil {
			return hsm.Config{}, err
		}
		return cfg.token(log), nil
	}
	if f.Token == "" || f.PINFile == "" {
		return hsm.Config{}, errors.New("--module goes with --token and --pin-file")
	}
	return hsm.Config{
		Module: f.Module, ModuleArgs: f.ModuleArgs, TokenLabel: f.Token, Serial: f.Serial, PINFile: f.PINFile,
		WeakAttributes: f.WeakAttributes, Log: log,
	}, nil
}

// open logs in to the token that the flags name.
func (f tokenFlags) open(ctx context.Context, log *slog.Logger) (*hsm.Token, error) {
	cfg, err := f.token(log)
	if err != nil {
		return nil, err
	}
	return hsm.Open(ctx, cfg)
}

// token is what the daemon opens.
func (c *Config) token(log *slog.Logger) hsm.Config {
	return hsm.Config{
		Module: c.HSM.Module, ModuleArgs: c.HSM.ModuleArgs, WeakAttributes: c.HSM.WeakAttributes,
		TokenLabel: c.HSM.Token, Serial: c.HSM.Serial,
		PINFile: c.HSM.PINFile, PINCredential: c.HSM.PINCredential, RefusalFile: filepath.Join(c.Data, "refused-pin"),
		Grace: c.HSM.Grace, Log: log,
	}
}

// Run makes the token and shows that it can be used. The PINs are on disk before the
// token has them: if the process dies in between, the same files serve again.
func (c hsmInit) Run(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	pin, err := hsm.NewPIN(c.PINFile)
	if err != nil {
		return err
	}
	soPIN, err := hsm.NewPIN(c.SOPINFile)
	if err != nil {
		return err
	}
	if pin == soPIN {
		return errors.New("the two PINs are the same: the user's must not be able to erase the token")
	}
	if err := hsm.InitToken(c.Module, c.Token, soPIN, pin); err != nil {
		return err
	}
	info, checks, err := hsm.Examine(ctx, hsm.Config{Module: c.Module, TokenLabel: c.Token, PINFile: c.PINFile, Log: log})
	if err != nil {
		return err
	}
	if err := failures(checks); err != nil {
		return fmt.Errorf("the token is made, and cannot be used: %w", err)
	}
	fmt.Fprintf(stdout, "made a token, and it does what kmed needs. For kmed.yaml:\n\nhsm:\n  module: %s\n  token: %s\n  serial: %q\n  pin_file: %s\n\nManufacturer %s, model %s. Take the security officer's PIN (%s) off this machine.\n",
		c.Module, c.Token, info.Serial, c.PINFile, info.Manufacturer, info.Model, c.SOPINFile)
	if info.Software {
		fmt.Fprintln(stdout, softHSMWarning)
	}
	return nil
}

const softHSMWarning = "the HSM is SoftHSM: a copy of its folder and the PIN open every key. For labs and tests only."

// failures is what a module does not do.
func failures(checks []hsm.Check) error {
	var errs []error
	for _, c := range checks {
		if c.Err != nil && !c.Weak {
			errs = append(errs, fmt.Errorf("%s: %w", c.Name, c.Err))
		}
	}
	return errors.Join(errs...)
}

// Run shows the token and its keys.
func (c hsmStatus) Run(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	token, err := c.open(ctx, log)
	if err != nil {
		return err
	}
	defer token.Close()
	info := token.Info()
	fmt.Fprintf(stdout, "token   %s %s, serial %s\n", info.Manufacturer, info.Model, info.Serial)
	if info.Software {
		fmt.Fprintln(stdout, "       ", softHSMWarning)
	}
	keys, err := token.Keys(ctx)
	if err != nil {
		return err
	}
	bad := 0
	for _, k := range keys {
		verdict := "ok"
		if k.Err != nil {
			verdict = "NOT A KEK OF OURS: " + k.Err.Error()
			bad++
		}
		fmt.Fprintf(stdout, "key     %s  id %x  check value %x  %s\n", k.Label, k.ID, k.CheckValue, verdict)
	}
	if bad > 0 {
		return fmt.Errorf("%d of the token's %d keys should not be there as they are", bad, len(keys))
	}
	fmt.Fprintf(stdout, "%d keys, nothing is wrong with them\n", len(keys))
	return nil
}

// Run shows what the module does, check by check.
func (c hsmSelftest) Run(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	cfg, err := c.token(log)
	if err != nil {
		return err
	}
	cfg.RetryPIN = c.RetryPIN
	info, checks, err := hsm.Examine(ctx, cfg)
	if err != nil && len(checks) == 0 {
		return err
	}
	fmt.Fprintf(stdout, "%s %s, serial %s\n", info.Manufacturer, info.Model, info.Serial)
	failed := 0
	for _, check := range checks {
		switch {
		case check.Err == nil:
			fmt.Fprintf(stdout, "ok      %s\n", check.Name)
		case check.Weak:
			fmt.Fprintf(stdout, "weak    %s: %v\n", check.Name, check.Err)
		default:
			fmt.Fprintf(stdout, "FAILED  %s: %v\n", check.Name, check.Err)
			failed++
		}
	}
	if failed > 0 {
		return errors.Join(fmt.Errorf("%d of %d checks failed: kmed cannot use this module", failed, len(checks)), err)
	}
	return err
}

// authSecretHead begins the file that goes to the other end.
const authSecretHead = "KME authentication secret v1 of link %s\n"

// Run makes a secret. The file is whole before the token has the secret: a file without
// a secret in the token is of no use to anybody.
func (c authSecretMake) Run(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	token, err := c.open(ctx, log)
	if err != nil {
		return err
	}
	defer token.Close()
	secret, err := token.NewAuthSecret(ctx)
	if err != nil {
		return err
	}
	defer clear(secret)
	text := append(hex.AppendEncode(fmt.Appendf(nil, authSecretHead, c.Link), secret), '\n')
	defer clear(text)
	f, err := os.OpenFile(c.Out, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = token.SetAuthSecret(ctx, c.Link, secret)
	}
	if err != nil {
		return errors.Join(err, os.Remove(c.Out))
	}
	fmt.Fprintf(stdout, "the token has an authentication secret for link %s, check value %s.\nTake %s to the other end by hand, import it there, compare check values by another way, and destroy every copy.\n",
		c.Link, hsm.AuthSecretCheck(secret), c.Out)
	return nil
}

// Run keeps in the token what the other end has made.
func (c authSecretImport) Run(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	text, err := os.ReadFile(c.In)
	if err != nil {
		return err
	}
	defer clear(text)
	digits, ok := bytes.CutPrefix(text, fmt.Appendf(nil, authSecretHead, c.Link))
	if !ok {
		return fmt.Errorf("%s does not hold the secret of link %s", c.In, c.Link)
	}
	secret := make([]byte, hsm.AuthSecretBytes)
	defer clear(secret)
	digits = bytes.TrimSuffix(digits, []byte("\n"))
	if len(digits) != hex.EncodedLen(len(secret)) {
		return fmt.Errorf("%s is not whole: %d hex digits, want %d", c.In, len(digits), hex.EncodedLen(len(secret)))
	}
	if _, err := hex.Decode(secret, digits); err != nil {
		return fmt.Errorf("%s is not whole", c.In) // hex's error has a digit of the secret in it
	}
	token, err := c.open(ctx, log)
	if err != nil {
		return err
	}
	defer token.Close()
	if err := token.SetAuthSecret(ctx, c.Link, secret); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "the token has an authentication secret for link %s, check value %s.\nDestroy %s.\n", c.Link, hsm.AuthSecretCheck(secret), c.In)
	return nil
}

// Run shows the check value.
func (c authSecretShow) Run(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	token, err := c.open(ctx, log)
	if err != nil {
		return err
	}
	defer token.Close()
	secret, err := token.AuthSecret(ctx, c.Link)
	if err != nil {
		return err
	}
	defer clear(secret)
	fmt.Fprintf(stdout, "link %s, check value %s\n", c.Link, hsm.AuthSecretCheck(secret))
	return nil
}

// Run destroys the secret.
func (c authSecretDestroy) Run(ctx context.Context, stdout io.Writer, log *slog.Logger) error {
	token, err := c.open(ctx, log)
	if err != nil {
		return err
	}
	defer token.Close()
	if err := token.DestroyAuthSecret(ctx, c.Link); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "the token has no authentication secret for link %s any more.\n", c.Link)
	return nil
}
