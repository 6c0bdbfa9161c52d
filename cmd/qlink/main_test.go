package main

import (
	"context"
	"fmt"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/qutemail/kme/internal/bb84"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/qlink"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"qlink": main})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"waitfor": waitFor,
			"block":   block,
			"sigterm": sigterm,
		},
	})
}

// waitFor PATH: until a channel answers on this control socket.
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: waitfor CONTROL")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := qlink.Command(ctx, ts.MkAbs(args[0]), "status")
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			ts.Fatalf("no channel answers: %v", err)
		}
	}
}

// sigterm: to every process in the background.
func sigterm(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 0 {
		ts.Fatalf("usage: sigterm")
	}
	for _, cmd := range ts.BackgroundCmds() {
		ts.Check(cmd.Process.Signal(syscall.SIGTERM))
	}
}

// block SESSION: both KMEs connect, seed their ends, exchange one block and print
// its figures.
func block(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] block SESSION")
	}
	session, err := strconv.ParseInt(args[0], 10, 64)
	ts.Check(err)
	clicks, percent, err := exchange(ts.MkAbs, session)
	switch {
	case neg && err != nil:
		fmt.Fprintln(ts.Stderr(), err)
	case neg:
		ts.Fatalf("the block arrived")
	default:
		ts.Check(err)
		fmt.Fprintf(ts.Stdout(), "clicks %d000 errors %.0f%%\n", clicks/1000, percent)
	}
}

func exchange(path func(string) string, session int64) (clicks int, percent float64, err error) {
	ctx := context.Background()
	open := func(name string, end handover.End) (*qlink.Box, error) {
		box, err := qlink.OpenBox(ctx, path(name+".sock"), path(name+".secret"), end)
		if err != nil {
			return nil, err
		}
		return box, box.Seed(ctx, [bb84.SeedSize]byte{byte(end)}, session)
	}
	alice, err := open("alice", handover.Alice)
	if err != nil {
		return 0, 0, err
	}
	defer alice.Close()
	bob, err := open("bob", handover.Bob)
	if err != nil {
		return 0, 0, err
	}
	defer bob.Close()
	if err := alice.Fire(ctx, session, 1, 10_000_000); err != nil {
		return 0, 0, err
	}
	seen, err := bob.Detections(ctx, session, 1)
	if err != nil {
		return 0, 0, err
	}
	sent, err := alice.Sent(ctx, session, 1, seen.Gates)
	if err != nil {
		return 0, 0, err
	}
	bit := func(b []byte, i int) int { return int(b[i/8] >> (i % 8) & 1) }
	same, wrong := 0, 0
	for i := range seen.Gates.Len() {
		if bit(sent.Bases, i) == bit(seen.Bases, i) {
			same++
			wrong += bit(sent.Bits, i) ^ bit(seen.Bits, i)
		}
	}
	return seen.Gates.Len(), 100 * float64(wrong) / float64(same), nil
}
