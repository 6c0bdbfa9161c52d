// Command kmed is the KME daemon: one node of a Key Management Entity. It serves
// SAEs (ETSI GS QKD 014 and the QuteMail routes), its peer KMEs and its operators,
// each behind a door of its own.
//
//	kmed serve --config kmed.yaml      as the daemon's database role
//	kmed migrate --database DSN        once per release, as the schema's owner
//	kmed sequencer --config kmed.yaml  as the sequencer's database role, if no node has it
//	kmed recover --config kmed.yaml    after the site's database was restored to the past
//	kmed zeroize --config kmed.yaml    in an emergency: destroys every key of the HSM's token
//	kmed hsm init|status|selftest|auth-secret    the key ceremony (hsm/README.md)
//	kmed config check|print-default    what is wrong with a configuration, and what there is
//
// Exit status 78 says that the HSM refused the PIN: nothing is to be started again
// before somebody has seen to it. Exit status 3 says that another process has taken the node's run over, since this
// one was paused or could not reach the database for a while: start it again. Exit status 65
// of the sequencer says that the audit log is forged.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/qutemail/kme/deploy"
	"github.com/qutemail/kme/hsm"
	"github.com/qutemail/kme/internal/release"
	"github.com/qutemail/kme/internal/secretfile"
	"github.com/qutemail/kme/internal/store"
)

type commands struct {
	Serve     serveCommand     `cmd:"" help:"Run a node until SIGTERM."`
	Migrate   migrateCommand   `cmd:"" help:"Bring the database's schema up to date, as its owner."`
	Recover   recoverCommand   `cmd:"" help:"Bring a site back whose database was restored to the past. All its nodes must be stopped."`
	Zeroize   zeroizeCommand   `cmd:"" help:"In an emergency: destroy every key of the token, and with it all that the site has stored. Works without the database and beside nodes that run."`
	Config    configCommands   `cmd:"" help:"Check a configuration, or print one with every member there is."`
	Sequencer sequencerCommand `cmd:"" help:"Fold the site's events into the audit log's tree, in a process of its own."`

	HSM hsmCommands `cmd:"" name:"hsm" help:"The key ceremony, and questions to the token."`

	LogLevel slog.Level       `placeholder:"LEVEL" help:"debug, info, warn or error (${default})." default:"info"`
	Version  kong.VersionFlag `help:"Print the version."`
}

type serveCommand struct {
	Config string `required:"" type:"existingfile" placeholder:"FILE" help:"The node's configuration file."`
}

type migrateCommand struct {
	Database string        `required:"" xor:"database" placeholder:"DSN" help:"Postgres DSN of the schema's owner, without a password: everybody on this machine can read it."`
	File     string        `required:"" xor:"database" name:"database-file" type:"existingfile" placeholder:"FILE" help:"A file with the DSN, which nobody but its owner can read."`
	Epoch    time.Duration `default:"1h" help:"Length of an epoch; fixed for the life of the database."`
}

type recoverCommand struct {
	Config string `required:"" type:"existingfile" placeholder:"FILE" help:"The configuration file of one of the site's nodes."`
	Burn   bool   `help:"Destroy all that may have been delivered already: every KEK and every key that the site holds, and the other end's part of the pool. Without it, only say what would be lost."`
}

type zeroizeCommand struct {
	Config  string `required:"" type:"existingfile" placeholder:"FILE" help:"The configuration file of one of the site's nodes."`
	Destroy bool   `name:"destroy-every-key" help:"Do it. There is no way back: what is stored is lost at this site, and kmed recover --burn begins anew."`
}

type sequencerCommand struct {
	Config string `required:"" type:"existingfile" placeholder:"FILE" help:"The configuration file: of it only kme, policies, hsm and audit.sequencer are used."`
}

// Run implements the command.
func (c migrateCommand) Run(ctx context.Context, log *slog.Logger) error {
	dsn := c.Database
	if c.File != "" {
		text, err := secretfile.Source{File: c.File}.Read(maxDSN)
		if err != nil {
			return fmt.Errorf("reading the DSN: %w", err)
		}
		dsn = strings.TrimSpace(string(text))
		clear(text)
	} else if namesPassword(dsn) {
		return errors.New("the DSN has a password, which everybody on this machine can read in the list of processes: " +
			"change it, and give the new one in --database-file, or in the environment as PGPASSFILE or PGPASSWORD")
	}
	return store.Migrate(ctx, dsn, c.Epoch, log)
}

// maxDSN is the longest DSN that is read from a file, in bytes.
const maxDSN = 4 << 10

// namesPassword says whether there is a password in a DSN, of either form, or something that
// may be one.
func namesPassword(dsn string) bool {
	if u, err := url.Parse(dsn); err == nil && u.Scheme != "" {
		_, has := u.User.Password()
		return has || u.Query().Has("password") || u.Query().Has("sslpassword")
	}
	return passwordWord.MatchString(dsn)
}

var passwordWord = regexp.MustCompile(`(?i)(^|[\s'])(ssl)?password\s*=`)

type configCommands struct {
	Check        configCheck        `cmd:"" help:"Say all that is wrong with a configuration and the files that it names. Nothing is opened: no HSM, no database, no socket."`
	PrintDefault configPrintDefault `cmd:"" help:"Print a configuration with every member there is, what it means and its default."`
}

type configCheck struct {
	Config string `required:"" type:"existingfile" placeholder:"FILE" help:"The node's configuration file."`
}

type configPrintDefault struct{}

// Run implements the command.
func (configPrintDefault) Run(stdout io.Writer) error {
	_, err := io.WriteString(stdout, deploy.KmedYAML)
	return err
}

const (
	exitFenced     = 3  // the node was taken over
	exitForged     = 65 // EX_DATAERR: what the sequencer says of the audit log stays so
	exitPINRefused = 78 // EX_CONFIG of sysexits.h: for systemd's RestartPreventExitStatus
)

// collectAt is how much garbage, in percent of what lives, is gathered before it is
// collected. A node's memory is small and short-lived: with Go's default of 100 a
// fifth of its work under load is collecting. GOGC in the environment wins.
const collectAt = 800

func main() {
	if err := errors.Join(beginAgain(), harden()); err != nil {
		fmt.Fprintln(os.Stderr, "kmed:", err)
		os.Exit(1)
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(collectAt)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "kmed:", err)
		switch {
		case errors.Is(err, hsm.ErrPINRefused):
			os.Exit(exitPINRefused)
		case isForged(err):
			os.Exit(exitForged)
		case errors.Is(err, store.ErrFenced):
			os.Exit(exitFenced)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var c commands
	helped := false
	parser, err := kong.New(&c, kong.Name("kmed"), kong.Description("The Key Management Entity daemon."), kong.Writers(stdout, stderr), kong.Vars{"version": "kmed " + release.Version()},
		kong.Exit(func(int) { helped = true }))
	if err != nil {
		return err
	}
	selected, err := parser.Parse(args)
	switch {
	case helped:
		return nil
	case err != nil:
		return fmt.Errorf("%w (kmed --help)", err)
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: c.LogLevel}))
	selected.BindTo(ctx, (*context.Context)(nil))
	selected.BindTo(stdout, (*io.Writer)(nil))
	return selected.Run(log)
}
