package main

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/yamlfile"
)

// Config is qlink's one file: deploy/qlink.yaml says what each member means. Unknown and
// repeated members are refused. Relative paths are relative to the file's folder.
type Config struct {
	Alice   EndConfig   `yaml:"alice"`
	Bob     EndConfig   `yaml:"bob"`
	Control string      `yaml:"control"` // socket of qlink tell; empty: none
	Light   LightConfig `yaml:"light"`
	Eve     float64     `yaml:"eve"` // fraction of the pulses that she intercepts from the start
}

// EndConfig is an end of the link.
type EndConfig struct {
	Socket     string `yaml:"socket"`
	SecretFile string `yaml:"secret_file"`
}

// LightConfig is bb84.Params. The defaults are those of the lab's link.
type LightConfig struct {
	Km                 float64     `yaml:"km"`
	LossDBPerKm        float64     `yaml:"loss_db_per_km"`
	DetectorEfficiency float64     `yaml:"detector_efficiency"`
	DarkCounts         float64     `yaml:"dark_counts"`
	Misalignment       float64     `yaml:"misalignment"`
	DeadGates          int         `yaml:"dead_gates"`
	Afterpulse         float64     `yaml:"afterpulse"`
	KeyBasis           float64     `yaml:"key_basis"`
	ClockHz            float64     `yaml:"clock_hz"`
	Intensities        []Intensity `yaml:"intensities"`
}

// Intensity is one kind of pulse.
type Intensity struct {
	Mu float64 `yaml:"mu"`
	P  float64 `yaml:"p"`
}

// standardLight is that of bb84.Standard.
func standardLight() LightConfig {
	p := bb84.Standard()
	l := LightConfig{
		Km: p.Km, LossDBPerKm: p.LossDBPerKm, DetectorEfficiency: p.EtaBob, DarkCounts: p.DarkPerGate, Misalignment: p.Misalignment,
		DeadGates: int(p.DeadGates), Afterpulse: p.Afterpulse, KeyBasis: p.PX, ClockHz: p.ClockHz,
	}
	for _, i := range p.Intensities {
		l.Intensities = append(l.Intensities, Intensity(i))
	}
	return l
}

func (l LightConfig) params() bb84.Params {
	p := bb84.Params{
		Km: l.Km, LossDBPerKm: l.LossDBPerKm, EtaBob: l.DetectorEfficiency, DarkPerGate: l.DarkCounts, Misalignment: l.Misalignment,
		DeadGates: int64(l.DeadGates), Afterpulse: l.Afterpulse, PX: l.KeyBasis, ClockHz: l.ClockHz,
	}
	for _, i := range l.Intensities {
		p.Intensities = append(p.Intensities, bb84.Intensity(i))
	}
	return p
}

// LoadConfig reads and checks a configuration file, the whole of it, before anything is
// opened. Its error has a line for each thing that is wrong, and says where it stands.
func LoadConfig(path string) (Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("reading the configuration: %w", err)
	}
	return parseConfig(path, text)
}

// parseConfig is LoadConfig of a file with that text.
func parseConfig(path string, text []byte) (Config, error) {
	c := Config{Light: standardLight()}
	file, err := yamlfile.Decode(path, text, &c)
	if err != nil {
		return c, err
	}
	if err := file.Resolve(&c.Alice.Socket, &c.Alice.SecretFile, &c.Bob.Socket, &c.Bob.SecretFile, &c.Control); err != nil {
		return c, err
	}
	return c, c.check(file)
}

// maxSocket is the length of the longest path that Linux takes for a local socket, in bytes.
const maxSocket = 107

// check names everything that is missing or out of bounds.
func (c *Config) check(file yamlfile.File) error {
	k := &yamlfile.Checker{File: file}
	named := make(map[string]string)
	for _, s := range []struct{ member, path string }{{"alice.socket", c.Alice.Socket}, {"bob.socket", c.Bob.Socket}, {"control", c.Control}} {
		if s.path == "" && s.member == "control" || !k.Has(s.member, s.path) {
			continue
		}
		k.Must(len(s.path) <= maxSocket, s.member, "is %s: its %d bytes are more than a socket's %d", s.path, len(s.path), maxSocket)
		k.Must(named[s.path] == "", s.member, "is the same as %s", named[s.path])
		named[s.path] = s.member
	}
	k.Has("alice.secret_file", c.Alice.SecretFile)
	k.Has("bob.secret_file", c.Bob.SecretFile)
	err := c.Light.params().Validate()
	k.Must(err == nil, "light", "is of no link: %v", err)
	err = c.eve().Validate()
	k.Must(err == nil, "eve", "is %v: 0 to 1", c.Eve)
	return k.Err()
}

func (c *Config) eve() bb84.Eve { return bb84.Eve{InterceptResend: c.Eve} }

// channel is what the configuration says, for package qlink.
func (c *Config) channel(log *slog.Logger) qlink.Config {
	return qlink.Config{
		AliceSocket: c.Alice.Socket, AliceSecretFile: c.Alice.SecretFile,
		BobSocket: c.Bob.Socket, BobSecretFile: c.Bob.SecretFile,
		ControlSocket: c.Control, Params: c.Light.params(), Eve: c.eve(), Log: log,
	}
}
