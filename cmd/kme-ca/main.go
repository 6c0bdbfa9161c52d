// Command kme-ca is the certificate authority of SAEs, KMEs and operators: it makes
// the root and the three issuing CAs, serves one of them, and prints one-time
// tokens. pki/README.md is the manual.
//
//	kme-ca init --dir ca ...                 once: makes the CAs, with a configuration for each
//	kme-ca serve --config ca/sae/ca.yaml     one process a CA
//	kme-ca token --dir ca sae alice          admits alice
//	kme-ca config check|print-default        what is wrong with a configuration, and what there is
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/qutemail/kme/deploy"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/release"
	"github.com/qutemail/kme/pki/authority"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "kme-ca:", err)
		os.Exit(1)
	}
}

// commands is the command line, for kong.
type commands struct {
	Init        initCommand        `cmd:"" help:"Make the root and the three issuing CAs in an empty directory."`
	Serve       serveCommand       `cmd:"" help:"Run the CA of one role until SIGTERM."`
	Render      renderCommand      `cmd:"" help:"Print the configuration with which the stock step-ca runs the CA of one role."`
	Token       tokenCommand       `cmd:"" help:"Print a one-time token, good for five minutes and one certificate."`
	Fingerprint fingerprintCommand `cmd:"" help:"Print the root's SHA-256, the pin for a client's first contact."`
	Config      configCommands     `cmd:"" help:"Check the configuration of a CA, or print one with every member there is."`

	Version kong.VersionFlag `help:"Print the version."`
}

// streams are where a command writes.
type streams struct{ stdout, stderr io.Writer }

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	helped := false
	parser, err := kong.New(&commands{}, kong.Name("kme-ca"), kong.Description("The certificate authority of a QKD key management site."),
		kong.Writers(stdout, stderr), kong.Vars{"version": "kme-ca " + release.Version()}, kong.Exit(func(int) { helped = true }))
	if err != nil {
		return err
	}
	selected, err := parser.Parse(args)
	switch {
	case helped:
		return nil
	case err != nil:
		return fmt.Errorf("%w (kme-ca --help)", err)
	}
	selected.BindTo(ctx, (*context.Context)(nil))
	return selected.Run(streams{stdout, stderr})
}

type initCommand struct {
	Dir         string                   `required:"" type:"path" help:"Directory to make; its root/ is to be carried off."`
	TrustDomain string                   `required:"" help:"DNS name under which all identities stand, e.g. lab.test."`
	Address     map[identity.Role]string `required:"" placeholder:"ROLE=HOST:PORT" help:"HTTPS address of each role's CA (sae, kme, operator)."`
	CRLAddress  map[identity.Role]string `placeholder:"ROLE=HOST:PORT" help:"Plain HTTP address of each role's CRL (default: port 10 above the HTTPS one)."`
	KMEName     []string                 `placeholder:"NAME" help:"DNS domain, IP address or prefix that KME certificates may carry beside localhost and 127.0.0.1. Repeatable."`

	Module  string            `default:"/usr/lib/softhsm/libsofthsm2.so" type:"path" help:"PKCS#11 library of the HSM that holds the keys. With SoftHSM (labs and tests only) the tokens are made here, one for each authority."`
	Token   map[string]string `placeholder:"OWNER=LABEL" help:"With another module: the token of each authority (root, sae, kme, operator), made with the vendor's tools."`
	PINFile map[string]string `name:"pin-file" placeholder:"OWNER=FILE" help:"With another module: the file with the PIN of each token."`
}

// Run implements the command.
func (c *initCommand) Run(out streams) error {
	addresses := make(map[identity.Role]authority.Address)
	for role, address := range c.Address {
		addresses[role] = authority.Address{HTTPS: address, CRL: c.CRLAddress[role]}
	}
	err := authority.Init(authority.InitConfig{
		Dir: c.Dir, TrustDomain: c.TrustDomain, Addresses: addresses, KMENames: c.KMEName, Token: c.token,
	})
	if err != nil {
		return err
	}
	return printFingerprint(c.Dir, out)
}

type serveCommand struct {
	Config string `required:"" type:"existingfile" placeholder:"FILE" help:"The CA's configuration: ca.yaml in the folder of its role."`
}

// Run implements the command.
func (c *serveCommand) Run(ctx context.Context, out streams) error {
	log := slog.New(slog.NewJSONHandler(out.stderr, nil))
	slog.SetDefault(log) // smallstep writes a line or two through package log
	if err := useSoftHSM(filepath.Dir(c.Config)); err != nil {
		return err
	}
	return authority.Serve(ctx, authority.ServeConfig{File: c.Config, Log: log})
}

type configCommands struct {
	Check        configCheck        `cmd:"" help:"Say all that is wrong with a configuration and the files that belong to it. Nothing is opened: no HSM, no database, no socket."`
	PrintDefault configPrintDefault `cmd:"" help:"Print a configuration with every member there is, what it means and its default."`
}

type configCheck struct {
	Config string `required:"" type:"existingfile" placeholder:"FILE" help:"The CA's configuration: ca.yaml in the folder of its role."`
}

// Run implements the command.
func (c *configCheck) Run(out streams) error {
	summary, err := authority.Check(c.Config)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out.stdout, "%s: ok: %s\n", c.Config, summary)
	return err
}

type configPrintDefault struct{}

// Run implements the command.
func (configPrintDefault) Run(out streams) error {
	_, err := io.WriteString(out.stdout, deploy.KMECAYAML)
	return err
}

type renderCommand struct {
	Dir  string        `required:"" type:"path" help:"Directory that init made."`
	Role identity.Role `required:"" enum:"sae,kme,operator" help:"Which CA: sae, kme or operator."`
}

// Run implements the command.
func (c *renderCommand) Run(out streams) error {
	text, err := authority.Render(c.Dir, c.Role)
	if err != nil {
		return err
	}
	_, err = out.stdout.Write(text)
	return err
}

type tokenCommand struct {
	Dir  string        `required:"" type:"path" help:"Directory that init made."`
	Role identity.Role `arg:"" help:"sae, kme or operator."`
	ID   string        `arg:"" help:"Whom the certificate will name: 1 to 64 of a-z, 0-9, ., _, @ and -."`
	Name []string      `help:"DNS name or IP address for a KME's certificate beside localhost and 127.0.0.1. Repeatable."`
}

// Run implements the command.
func (c *tokenCommand) Run(out streams) error {
	token, err := authority.Token(c.Dir, c.Role, c.ID, time.Now(), c.Name...)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(out.stdout, token)
	return err
}

type fingerprintCommand struct {
	Dir string `required:"" type:"path" help:"Directory that init made."`
}

// Run implements the command.
func (c *fingerprintCommand) Run(out streams) error { return printFingerprint(c.Dir, out) }

func printFingerprint(dir string, out streams) error {
	fingerprint, err := authority.Fingerprint(dir)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(out.stdout, fingerprint)
	return err
}
