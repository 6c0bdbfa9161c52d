// Command kmectl is the command line of SAEs and operators. It speaks to a KME over
// mutual TLS through the clients that the product ships, and to nothing else.
//
//	kmectl --as alice get --slave bob
//	kmectl --as bob take --master alice KEY_ID
//	kmectl node
//	kmectl link --watch
//
// Keys go to standard output, one "ID key" a line; advice goes to standard error.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/qutemail/kme/internal/release"
)

// commands is the command line.
type commands struct {
	As       string        `placeholder:"NAME" help:"Act as NAME, whose certificate lies in a profile: saes/NAME or operators/NAME."`
	Cert     string        `placeholder:"FILE" help:"Certificate chain (PEM), instead of a profile's."`
	Key      string        `placeholder:"FILE" help:"Its private key (PEM)."`
	CA       string        `name:"ca" placeholder:"FILE" help:"The root that the KME's certificate must chain to (PEM)."`
	KME      []string      `name:"kme" placeholder:"URL" help:"The KME's door, instead of the profile's. Several, with commas, are nodes of it: the next one is tried if one cannot be reached."`
	Profiles string        `default:".lab" placeholder:"DIR" env:"KMECTL_PROFILES" help:"Where profiles lie (${default})."`
	JSON     bool          `name:"json" help:"Print what the KME answered, as JSON."`
	Timeout  time.Duration `default:"15s" help:"How long to wait for an answer (${default})."`

	ShowVersion kong.VersionFlag `name:"version" help:"Print the version."`

	Get     getCommand     `cmd:"" help:"Get new keys to share with another SAE."`
	Take    takeCommand    `cmd:"" help:"Take keys that another SAE has got to share with you. Each can be taken once."`
	Consume consumeCommand `cmd:"" help:"Have a key erased that was made for you (QuteMail's routes)."`
	Status  statusCommand  `cmd:"" help:"See what you could get to share with another SAE."`
	Node    nodeCommand    `cmd:"" help:"See how a KME node stands (operators)."`
	Link    linkCommand    `cmd:"" help:"See how its QKD links stand (operators)."`
	Epochs  epochsCommand  `cmd:"" help:"See how the epochs stand, and when what was handed out cannot be recovered any more (operators)."`
	Alarms  alarmsCommand  `cmd:"" help:"See what a KME node complains of (operators)."`
	Audit   trailCommand   `cmd:"" help:"Read and verify the audit log (auditors)."`
	KeyOps  keyCommands    `cmd:"" name:"key" help:"About keys, for operators: their story, and having them burned."`
	Cleanup cleanupCommand `cmd:"" help:"Have keys ended whose lifetime is over, now (operators)."`
	Doctor  doctorCommand  `cmd:"" help:"Look at everything that a KME node depends on, and say what to do about what is not well (operators)."`
	SAE     saeCommand     `cmd:"" name:"sae" help:"See who is let in, shut an SAE out, let it in again (operators)."`
	Approve approveCommand `cmd:"" help:"Give your word for an act that takes two officers."`
	Policy  policyCommand  `cmd:"" help:"Look at policies offline, and have a node read them again."`

	Principal principalCommand `cmd:"" help:"Look at principals.yaml offline: whom a certificate names, and why."`

	Version versionCommand `cmd:"" help:"Print the version."`
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "kmectl:", err)
		if advice, ok := errors.AsType[*advised](err); ok {
			fmt.Fprintln(os.Stderr, "       ", advice.next)
		}
		os.Exit(1)
	}
}

// session is what a command works with.
type session struct {
	commands
	stdout, stderr io.Writer
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	s := &session{stdout: stdout, stderr: stderr}
	helped := false
	parser, err := kong.New(&s.commands,
		kong.Name("kmectl"), kong.Description("The command line of a KME's SAEs and operators."),
		kong.Writers(stdout, stderr), kong.Vars{"version": "kmectl " + release.Version()}, kong.Exit(func(int) { helped = true }))
	if err != nil {
		return err
	}
	selected, err := parser.Parse(args)
	if helped {
		return nil
	}
	if err != nil {
		return advise(err, "kmectl --help lists the commands, kmectl COMMAND --help its flags")
	}
	selected.BindTo(ctx, (*context.Context)(nil))
	return selected.Run(s)
}

type versionCommand struct{}

// Run prints the version.
func (versionCommand) Run(s *session) error {
	v := struct {
		Version string `json:"version"`
		Go      string `json:"go"`
	}{release.Version(), runtime.Version()}
	return s.say(v, "kmectl %s %s %s/%s\n", v.Version, v.Go, runtime.GOOS, runtime.GOARCH)
}

// say prints a value as JSON if that was asked for, and otherwise a sentence.
func (s *session) say(v any, sentence string, args ...any) error {
	if s.JSON {
		return s.printJSON(v)
	}
	_, err := fmt.Fprintf(s.stdout, sentence, args...)
	return err
}

// printJSON prints a value of a wire type.
func (s *session) printJSON(v any) error {
	text, err := json.Marshal(v, jsontext.WithIndent("  "))
	if err != nil {
		return fmt.Errorf("writing JSON: %w", err)
	}
	_, err = fmt.Fprintf(s.stdout, "%s\n", text)
	return err
}
