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
		eve, err := parseEve(words[1])
		if err != nil {
			return "", err
		}
		f.eve = eve // from the next block on
		f.log.Info("eve", "does", describe(eve))
		return "ok", nil
	case len(words) == 2 && (words[0] == "drift" || words[0] == "burst" || words[0] == "stall"):
		if err := f.upset.set(words[0], words[1]); err != nil {
			return "", err
		}
		f.log.Info("trouble", words[0], words[1])
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
	return "", errors.New("want: eve FRACTION|split|blind, drift STEP, burst FACTOR, stall TIME, cut, mend or status")
}

// parseEve reads what she is to do.
func parseEve(word string) (bb84.Eve, error) {
	switch word {
	case "split":
		return bb84.Eve{SplitPhotons: true}, nil
	case "blind":
		return bb84.Eve{Blind: true}, nil
	}
	fraction, err := strconv.ParseFloat(word, 64)
	if err != nil {
		return bb84.Eve{}, fmt.Errorf("eve %q: want a fraction, split or blind", word)
	}
	eve := bb84.Eve{InterceptResend: fraction}
	return eve, eve.Validate()
}

// describe is what parseEve reads.
func describe(e bb84.Eve) string {
	switch {
	case e.SplitPhotons:
		return "split"
	case e.Blind:
		return "blind"
	}
	return strconv.FormatFloat(e.InterceptResend, 'g', -1, 64)
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
	return fmt.Sprintf("fibre=%s km=%g eve=%s alice=%s bob=%s blocks=%d lost=%d gates=%d detections=%d doubles=%d",
		state, f.params.Km, describe(f.eve), alice, bob,
		f.stats.blocks, f.stats.lost, f.stats.gates, f.stats.detections, f.stats.doubles)
}

// Command sends one line to the control socket of a Server and returns its answer
// without the leading "ok". The commands:
//
//	eve FRACTION  from the next block on, Eve intercepts this fraction of the pulses; 0: she leaves
//	eve split     she splits photon numbers
//	eve blind     she blinds Bob's detectors
//	drift STEP    every block adds this to the misalignment; 0: aligned anew
//	burst FACTOR  the next block has so many times the dark counts
//	stall TIME    every block begins so much later ("500ms"); 0s: no more
//	cut           cut the fibre; a block under way is gone
//	mend          mend it
//	status        "name=value ..." on one line: fibre (whole or cut), km, eve, alice and bob (session or
//	              away), and since the start: blocks, lost, gates, detections, doubles
func Command(ctx context.Context, path, line string) (string, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return "", fmt.Errorf("connecting to the control socket (does the channel run, and is it this one that control names in its configuration?): %w", err)
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
