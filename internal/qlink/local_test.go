package qlink

import (
	"bytes"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/qutemail/kme/internal/handover"
)

func TestWhoMayOpenAnEnd(t *testing.T) {
	c := newChannel(t, nil)
	alice, _ := c.seeded(t, 1)
	wrong := filepath.Join(shortDir(t), "wrong")
	writeSecret(t, wrong, "not the secret of anybody", 0o600)
	for _, tc := range []struct {
		name           string
		socket, secret string
		end            handover.End
	}{
		{"wrong secret", c.AliceSocket, wrong, handover.Alice},
		{"the other end's secret", c.AliceSocket, c.BobSecretFile, handover.Alice},
		{"the other end's socket", c.BobSocket, c.AliceSecretFile, handover.Alice},
		{"wrong end", c.AliceSocket, c.AliceSecretFile, handover.Bob},
		{"no end", c.AliceSocket, c.AliceSecretFile, 0},
	} {
		_, err := OpenBox(t.Context(), tc.socket, tc.secret, tc.end)
		refused(t, tc.name, err)
	}
	// None of them put the rightful owner out.
	ok(t, alice.Fire(t.Context(), 1, 1, 1000))
}

// Whatever a stranger sends before the right secret, he is hung up on, and what
// stands at the end is not disturbed.
func TestStrangers(t *testing.T) {
	c := newChannel(t, nil)
	alice, _ := c.seeded(t, 1)
	for name, first := range map[string][]byte{
		"nothing":         nil,
		"a seed":          frame(t, kindSeed, make([]byte, 40)),
		"an empty hello":  frame(t, kindHello, nil),
		"another version": frame(t, kindHello, append([]byte{wireVersion + 1, 'a'}, "alice's secret, long enough"...)),
		"a huge hello":    {0, 1, 0, 0, kindHello},
		"HTTP":            []byte("GET / HTTP/1.1\r\n\r\n"),
	} {
		conn, err := net.Dial("unix", c.AliceSocket)
		ok(t, err)
		_, err = conn.Write(first)
		ok(t, err)
		ok(t, conn.(*net.UnixConn).CloseWrite())
		if kind, _, err := readFrame(conn, maxFrame); err == nil && kind != kindRefused {
			t.Errorf("%s: answered with kind %#x", name, kind)
		}
		ok(t, conn.Close())
	}
	ok(t, alice.Fire(t.Context(), 1, 1, 1000))
}

// A rightful owner who breaks the protocol is hung up on.
func TestMalformedRequests(t *testing.T) {
	c := newChannel(t, nil)
	for name, request := range map[string][]byte{
		"a kind of bob's":    frame(t, kindDetections, make([]byte, 16)),
		"no such kind":       frame(t, 0x42, nil),
		"a short seed":       frame(t, kindSeed, make([]byte, 39)),
		"a negative session": frame(t, kindSeed, bytes.Repeat([]byte{0xff}, 40)),
		"a lying list":       frame(t, kindSent, put8(nil, 1, 1, 1000)),
		"a frame too large":  {0xff, 0xff, 0xff, 0xff},
	} {
		box := c.open(t, handover.Alice)
		_, err := box.conn.Write(request)
		ok(t, err)
		if kind, _, err := readFrame(box.conn, maxFrame); err == nil {
			t.Errorf("%s: answered with kind %#x", name, kind)
		}
	}
}

func TestSocketsArePrivate(t *testing.T) {
	old := syscall.Umask(0) // the worst case; no other test runs beside this one
	defer syscall.Umask(old)
	c := newChannel(t, nil)
	for _, path := range []string{c.AliceSocket, c.BobSocket, c.ControlSocket} {
		info, err := os.Stat(path)
		ok(t, err)
		if info.Mode() != os.ModeSocket|0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
	}
}

func TestSecretFiles(t *testing.T) {
	path := filepath.Join(shortDir(t), "secret")
	for _, tc := range []struct {
		name, secret string
		mode         os.FileMode
		good         bool
	}{
		{"shortest", strings.Repeat("s", 16), 0o600, true},
		{"longest", strings.Repeat("s", 1024) + "\r\n", 0o400, true},
		{"too short", strings.Repeat("s", 15) + "\n", 0o600, false},
		{"too long", strings.Repeat("s", 1025), 0o600, false},
		{"empty", "", 0o600, false},
		{"readable by the group", strings.Repeat("s", 16), 0o640, false},
		{"readable by all", strings.Repeat("s", 16), 0o604, false},
	} {
		writeSecret(t, path, tc.secret, tc.mode|0o200)
		ok(t, os.Chmod(path, tc.mode))
		got, err := readSecret(path)
		if (err == nil) != tc.good || tc.good && string(got) != strings.TrimRight(tc.secret, "\r\n") {
			t.Errorf("%s: got %d bytes, %v", tc.name, len(got), err)
		}
		if err != nil && strings.Contains(err.Error(), "sss") {
			t.Errorf("%s: the error tells the secret", tc.name)
		}
		ok(t, os.Remove(path))
	}
	if _, err := readSecret(filepath.Dir(path)); err == nil {
		t.Error("a folder was taken for a secret")
	}
}

func TestListenRefuses(t *testing.T) {
	running := newChannel(t, nil)
	for name, spoil := range map[string]func(*Config){
		"one secret for both": func(c *Config) { c.BobSecretFile = c.AliceSecretFile },
		"no secret":           func(c *Config) { c.AliceSecretFile += ".not" },
		"a served socket":     func(c *Config) { c.BobSocket = running.BobSocket },
		"a file in the way":   func(c *Config) { c.AliceSocket = c.AliceSecretFile },
		"no folder":           func(c *Config) { c.ControlSocket += "/not/there" },
		"impossible physics":  func(c *Config) { c.Params.EtaBob = 2 },
		"impossible Eve":      func(c *Config) { c.Eve.InterceptResend = 2 },
	} {
		cfg := running.Config
		dir := shortDir(t)
		cfg.AliceSocket, cfg.BobSocket, cfg.ControlSocket = filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "c")
		spoil(&cfg)
		if s, err := Listen(t.Context(), cfg); err == nil {
			t.Errorf("%s: accepted", name)
			ok(t, s.Close())
		}
		left, err := filepath.Glob(filepath.Join(dir, "*"))
		ok(t, err)
		if len(left) != 0 {
			t.Errorf("%s: left %v behind", name, left)
		}
	}
}

// The socket of a process that was killed is no obstacle to the next.
func TestStaleSocket(t *testing.T) {
	c := newChannel(t, func(cfg *Config) {
		addr := &net.UnixAddr{Name: cfg.AliceSocket, Net: "unix"}
		l, err := net.ListenUnix("unix", addr)
		ok(t, err)
		l.SetUnlinkOnClose(false)
		ok(t, l.Close())
		if _, err := os.Lstat(cfg.AliceSocket); err != nil {
			t.Fatal(err)
		}
	})
	c.seeded(t, 1)
}

func TestControl(t *testing.T) {
	c := newChannel(t, nil)
	for _, line := range []string{"", "eve", "eve x", "eve -1", "eve 1.5", "eve NaN", "eve 1 2", "cut it", "status?"} {
		_, err := Command(t.Context(), c.ControlSocket, line)
		refused(t, line, err)
	}
	if _, err := Command(t.Context(), c.ControlSocket, "cut\nmend"); err == nil {
		t.Error("two lines were taken for a command")
	}
	if _, err := Command(t.Context(), c.ControlSocket, strings.Repeat("x", 10*maxCommand)); err == nil {
		t.Error("an endless line was answered")
	}
	const want = "fibre=whole km=10 eve=0 alice=away bob=away blocks=0 lost=0 gates=0 detections=0 doubles=0"
	if got := c.tell(t, "status"); got != want {
		t.Errorf("status %q, want %q", got, want)
	}
	c.stop()
	if _, err := Command(t.Context(), c.ControlSocket, "status"); err == nil || errors.As(err, new(*Refusal)) {
		t.Errorf("status of a channel that has closed: %v", err)
	}
}
