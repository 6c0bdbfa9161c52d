package qlink

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/bb84"
)

const maxCommand = 256 // bytes of a line

// serveControl answers each line of a connection with one line: "ok", "ok" and
// what was asked for, or "error: " and what is wrong.
func (s *Server) serveControl(conn net.Conn) {
	lines := bufio.NewScanner(conn)
	lines.Buffer(make([]byte, 0, maxCommand), maxCommand)
	for lines.Scan() {
		answer, err := s.fibre.command(lines.Text())
		if err != nil {
			answer = "error: " + err.Error()
		}
		if _, err := fmt.Fprintln(conn, answer); err != nil {
			return
		}
	}
}

// command carries out one line.
func (f *fibre) command(line string) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	words := strings.Fields(line)
	switch {
	case len(words) == 2 && words[0] == "eve":
		fraction, err := strconv.ParseFloat(words[1], 64)
		if err != nil {
			return "", fmt.Errorf("fraction %q: want a number", words[1])
		}
		eve := bb84.Eve{InterceptResend: fraction}
		if err := eve.Validate(); err != nil {
			return "", err
		}
		f.eve = eve // from the next block on
		f.log.Info("eve", "fraction", fraction)
		return "ok", nil
	case len(words) != 1:
	case words[0] == "cut":
		f.cut, f.cuts = true, f.cuts+1
		f.log.Info("fibre cut")
		return "ok", nil
	case words[0] == "mend":
		f.cut = false
		f.log.Info("fibre mended")
		return "ok", nil
	case words[0] == "status":
		return "ok " + f.status(), nil
	}
	return "", errors.New("want: eve FRACTION, cut, mend or status")
}

// status is called under mu.
func (f *fibre) status() string {
	state := "whole"
	if f.cut {
		state = "cut"
	}
	alice, bob := "away", "away"
	if t := f.alice; t != nil && t.seeded {
		alice = strconv.FormatInt(t.session, 10)
	}
	if r := f.bob; r != nil && r.seeded {
		bob = strconv.FormatInt(r.session, 10)
	}
	return fmt.Sprintf("fibre=%s km=%g eve=%g alice=%s bob=%s blocks=%d lost=%d gates=%d detections=%d doubles=%d",
		state, f.params.Km, f.eve.InterceptResend, alice, bob,
		f.stats.blocks, f.stats.lost, f.stats.gates, f.stats.detections, f.stats.doubles)
}

// Command sends one line to the control socket of a Server and returns its answer
// without the leading "ok". The commands:
//
//	eve FRACTION  from the next block on, Eve intercepts this fraction of the photons; 0: she leaves
//	cut           cut the fibre; a block under way is gone
//	mend          mend it
//	status        "name=value ..." on one line: fibre (whole or cut), km, eve, alice and bob (session or
//	              away), and since the start: blocks, lost, gates, detections, doubles
func Command(ctx context.Context, path, line string) (string, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return "", fmt.Errorf("connecting to the control socket: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if strings.ContainsAny(line, "\r\n") {
		return "", errors.New("a command is one line")
	}
	if _, err := fmt.Fprintln(conn, line); err != nil {
		return "", fmt.Errorf("sending a command: %w", err)
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("reading the answer to a command: %w", err)
	}
	answer = strings.TrimSuffix(answer, "\n")
	if reason, ok := strings.CutPrefix(answer, "error: "); ok {
		return "", &Refusal{Reason: reason}
	}
	rest, ok := strings.CutPrefix(answer, "ok")
	if !ok {
		return "", fmt.Errorf("%w: %.40q", errMalformed, answer)
	}
	return strings.TrimSpace(rest), nil
}
