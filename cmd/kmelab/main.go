// Command kmelab runs a whole two-site QKD network on one machine: certificate
// authorities, a SoftHSM token and a private Postgres per site, a simulated fibre,
// KM1 and KM2, and a few SAEs. `kmelab up` is what `make run` starts. It is a lab:
// the secrets of both sites lie in one folder.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/qutemail/kme/internal/lab"
	"github.com/qutemail/kme/internal/release"
)

type commands struct {
	Up    upCommand    `cmd:"" help:"Start the lab, show that it works, and run until Ctrl-C."`
	Check checkCommand `cmd:"" help:"Hold the invariants against the databases and tokens of the lab."`

	Dir      string     `default:".lab" help:"Folder of the lab."`
	LogLevel slog.Level `default:"warn" help:"debug, info, warn or error: of the lab itself; each part has a log of its own."`

	Version kong.VersionFlag `help:"Print the version."`
}

type upCommand struct {
	Nodes     int     `default:"1" help:"Nodes of each site (${default}; at most 26)."`
	Links     int     `default:"1" help:"Links between the sites, each with a quantum channel of its own (${default}; at most 9)."`
	Eve       float64 `placeholder:"FRACTION" help:"Of the photons, how many Eve measures and sends on: 0 to 1."`
	FreePorts bool    `help:"Begin a new lab on whatever ports are free, instead of those of the README."`
}

type checkCommand struct{}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, context.Canceled) {
		fmt.Fprintln(os.Stderr, "kmelab:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var c commands
	helped := false
	parser, err := kong.New(&c, kong.Name("kmelab"), kong.Description("A two-site QKD key management lab on one machine."),
		kong.Writers(stdout, stderr), kong.Vars{"version": "kmelab " + release.Version()}, kong.Exit(func(int) { helped = true }))
	if err != nil {
		return err
	}
	selected, err := parser.Parse(args)
	switch {
	case helped:
		return nil
	case err != nil:
		return fmt.Errorf("%w (kmelab --help)", err)
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: c.LogLevel}))
	bin, err := os.Executable()
	if err != nil {
		return err
	}
	cfg := lab.Config{Dir: c.Dir, Bin: filepath.Dir(bin), Log: log}
	if selected.Command() == "check" {
		return check(ctx, cfg, stdout)
	}
	cfg.Nodes, cfg.Links, cfg.Eve = c.Up.Nodes, c.Up.Links, c.Up.Eve
	switch {
	case cfg.Nodes < 1 || cfg.Nodes > 26:
		return fmt.Errorf("--nodes %d: a site has 1 to 26", cfg.Nodes)
	case cfg.Links < 1 || cfg.Links > 9:
		return fmt.Errorf("--links %d: there are 1 to 9", cfg.Links)
	case !(cfg.Eve >= 0 && cfg.Eve <= 1): // nor NaN
		return fmt.Errorf("--eve %v: a fraction, 0 to 1", cfg.Eve)
	}
	if c.Up.FreePorts {
		if cfg.Ports, err = lab.FreePorts(c.Up.Nodes); err != nil {
			return err
		}
	}
	return up(ctx, cfg, newScreen(stdout))
}

// check prints what the invariants say; a violation is an error.
func check(ctx context.Context, cfg lab.Config, stdout io.Writer) error {
	report, err := lab.CheckDir(ctx, cfg)
	if err != nil {
		return err
	}
	for _, v := range report.Violations {
		fmt.Fprintln(stdout, v)
	}
	fmt.Fprintln(stdout, report.Summary())
	if len(report.Violations) > 0 {
		return errors.New("the invariants do not hold")
	}
	return nil
}
