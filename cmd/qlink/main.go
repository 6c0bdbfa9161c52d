// Command qlink is the quantum channel of a link as a process: laser, fibre,
// detectors, and Eve if asked. The KME of either end opens its local socket with
// that end's secret.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/qutemail/kme/internal/bb84"
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
	Serve serve `cmd:"" default:"withargs" help:"Carry light between the two ends until SIGTERM (the default command)."`
	Tell  tell  `cmd:"" help:"Send a command to a running channel: eve, drift, burst, stall, cut, mend or status."`

	Version kong.VersionFlag `help:"Print the version."`
}

// serve is the channel itself.
type serve struct {
	AliceSocket string `required:"" placeholder:"PATH" help:"Local socket of the sending end; made with mode 0600."`
	BobSocket   string `required:"" placeholder:"PATH" help:"Local socket of the receiving end."`
	AliceSecret string `required:"" placeholder:"FILE" help:"Secret that opens the sending end; a file of mode 0600 and 16 to 1024 bytes."`
	BobSecret   string `required:"" placeholder:"FILE" help:"Secret that opens the receiving end."`
	Control     string `placeholder:"PATH" help:"Local socket for the tell command; none without it."`

	Km           float64 `default:"${km}" help:"Length of the fibre."`
	Loss         float64 `default:"${loss}" help:"Loss of the fibre in dB/km."`
	Eta          float64 `default:"${eta}" help:"Chance that a photon at the receiver's door makes a click."`
	Dark         float64 `default:"${dark}" help:"Chance of a dark count, per gate and detector."`
	Misalignment float64 `default:"${misalignment}" help:"Chance that a photon goes to the wrong detector."`
	PX           float64 `name:"px" default:"${px}" help:"Chance of the key basis, at either end."`
	DeadGates    int64   `default:"${dead}" help:"Gates for which both detectors are off after a click."`
	Afterpulse   float64 `default:"${afterpulse}" help:"Chance of an afterpulse in the first live gate."`
	ClockHz      float64 `default:"${clock}" help:"Gates per second of the link that is simulated."`
	Eve          float64 `default:"0" help:"Fraction of the pulses that Eve intercepts from the start."`

	Intensity []string `name:"intensity" default:"${intensities}" placeholder:"MU:P" help:"Mean photon number of a kind of pulse, and the chance that a pulse is of it; brightest first, two (one decoy) or three (two decoys) of them."`
}

// tell speaks to the control socket.
type tell struct {
	Control string   `required:"" placeholder:"PATH" help:"Control socket of the channel."`
	Command []string `arg:"" help:"eve FRACTION, eve split, eve blind, drift STEP, burst FACTOR, stall TIME, cut, mend or status."`
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var c commands
	helped := false
	parser, err := kong.New(&c, kong.Name("qlink"), kong.Writers(stdout, stderr), defaults(), kong.Vars{"version": "qlink " + release.Version()},
		kong.Description("The quantum channel of a QKD link, simulated."),
		kong.Exit(func(int) { helped = true }))
	if err != nil {
		return err
	}
	parsed, err := parser.Parse(args)
	switch {
	case helped:
		return nil
	case err != nil:
		return err
	case strings.HasPrefix(parsed.Command(), "tell"):
		answer, err := qlink.Command(ctx, c.Tell.Control, strings.Join(c.Tell.Command, " "))
		if err != nil {
			return err
		}
		if answer != "" {
			_, err = fmt.Fprintln(stdout, answer)
		}
		return err
	}
	config, err := c.Serve.config(slog.New(slog.NewTextHandler(stderr, nil)))
	if err != nil {
		return err
	}
	return qlink.Serve(ctx, config)
}

// defaults are those of the lab's link.
func defaults() kong.Vars {
	p := bb84.Standard()
	number := func(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
	var intensities []string
	for _, i := range p.Intensities {
		intensities = append(intensities, number(i.Mu)+":"+number(i.P))
	}
	return kong.Vars{
		"km": number(p.Km), "loss": number(p.LossDBPerKm), "eta": number(p.EtaBob), "dark": number(p.DarkPerGate),
		"misalignment": number(p.Misalignment), "px": number(p.PX), "clock": number(p.ClockHz),
		"dead": strconv.FormatInt(p.DeadGates, 10), "afterpulse": number(p.Afterpulse), "intensities": strings.Join(intensities, ","),
	}
}

func (s *serve) config(log *slog.Logger) (qlink.Config, error) {
	intensities, err := parseIntensities(s.Intensity)
	if err != nil {
		return qlink.Config{}, err
	}
	return qlink.Config{
		AliceSocket: s.AliceSocket, BobSocket: s.BobSocket, ControlSocket: s.Control,
		AliceSecretFile: s.AliceSecret, BobSecretFile: s.BobSecret,
		Params: bb84.Params{
			Km: s.Km, LossDBPerKm: s.Loss, EtaBob: s.Eta, DarkPerGate: s.Dark, Misalignment: s.Misalignment,
			PX: s.PX, DeadGates: s.DeadGates, Afterpulse: s.Afterpulse, ClockHz: s.ClockHz, Intensities: intensities,
		},
		Eve: bb84.Eve{InterceptResend: s.Eve},
		Log: log,
	}, nil
}

// parseIntensities reads MU:P, one for each kind of pulse.
func parseIntensities(words []string) ([]bb84.Intensity, error) {
	var list []bb84.Intensity
	for _, word := range words {
		mu, p, found := strings.Cut(word, ":")
		var i bb84.Intensity
		var err, err2 error
		i.Mu, err = strconv.ParseFloat(mu, 64)
		i.P, err2 = strconv.ParseFloat(p, 64)
		if !found || err != nil || err2 != nil {
			return nil, fmt.Errorf("intensity %q: want MU:P, two numbers", word)
		}
		list = append(list, i)
	}
	return list, nil
}
