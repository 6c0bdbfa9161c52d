// Command qlink is the quantum channel of a link as a process: laser, fibre,
// detectors, and Eve if asked. The KME of either end opens its local socket with
// that end's secret.
//
//	qlink serve --config qlink.yaml
//	qlink tell --control SOCKET eve 0.5
//	qlink config check|print-default    what is wrong with a configuration, and what there is
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/qutemail/kme/deploy"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/release"
)

// collectAt is how much garbage, in percent of what lives, is gathered before it is
// collected: a channel holds a block or two, and throws them away.
const collectAt = 400

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(collectAt)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "qlink:", err)
		os.Exit(1)
	}
}

// commands is the command line.
type commands struct {
	Serve  serveCommand   `cmd:"" help:"Carry light between the two ends until SIGTERM."`
	Tell   tellCommand    `cmd:"" help:"Send a command to a running channel: eve, drift, burst, stall, cut, mend or status."`
	Config configCommands `cmd:"" help:"Check a configuration, or print one with every member there is."`

	Version kong.VersionFlag `help:"Print the version."`
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	helped := false
	parser, err := kong.New(&commands{}, kong.Name("qlink"), kong.Description("The quantum channel of a QKD link, simulated."),
		kong.Writers(stdout, stderr), kong.Vars{"version": "qlink " + release.Version()}, kong.Exit(func(int) { helped = true }))
	if err != nil {
		return err
	}
	selected, err := parser.Parse(args)
	switch {
	case helped:
		return nil
	case err != nil:
		return fmt.Errorf("%w (qlink --help)", err)
	}
	selected.BindTo(ctx, (*context.Context)(nil))
	selected.BindTo(stdout, (*io.Writer)(nil))
	return selected.Run(slog.New(slog.NewTextHandler(stderr, nil)))
}

type serveCommand struct {
	Config string `required:"" type:"existingfile" placeholder:"FILE" help:"The channel's configuration file."`
}

// Run is the channel itself.
func (c serveCommand) Run(ctx context.Context, log *slog.Logger) error {
	cfg, err := LoadConfig(c.Config)
	if err != nil {
		return err
	}
	return qlink.Serve(ctx, cfg.channel(log))
}

type tellCommand struct {
	Control string   `required:"" placeholder:"SOCKET" help:"The channel's control socket: control in its configuration."`
	Command []string `arg:"" help:"eve FRACTION, eve split, eve blind, drift STEP, burst FACTOR, stall TIME, cut, mend or status."`
}

// Run sends the command and prints the answer, if there is one.
func (c tellCommand) Run(ctx context.Context, stdout io.Writer) error {
	answer, err := qlink.Command(ctx, c.Control, strings.Join(c.Command, " "))
	if err != nil || answer == "" {
		return err
	}
	_, err = fmt.Fprintln(stdout, answer)
	return err
}

type configCommands struct {
	Check        configCheck        `cmd:"" help:"Say all that is wrong with a configuration and the secrets that it names. No socket is opened."`
	PrintDefault configPrintDefault `cmd:"" help:"Print a configuration with every member there is, what it means and its default."`
}

type configCheck struct {
	Config string `required:"" type:"existingfile" placeholder:"FILE" help:"The channel's configuration file."`
}

// Run may be beside the channel that serves.
func (c configCheck) Run(stdout io.Writer) error {
	cfg, err := LoadConfig(c.Config)
	if err != nil {
		return err
	}
	if err := cfg.channel(nil).CheckSecrets(); err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s: ok: a link of %g km, alice's end at %s, bob's at %s\n", c.Config, cfg.Light.Km, cfg.Alice.Socket, cfg.Bob.Socket)
	return err
}

type configPrintDefault struct{}

// Run implements the command.
func (configPrintDefault) Run(stdout io.Writer) error {
	_, err := io.WriteString(stdout, deploy.QlinkYAML)
	return err
}
