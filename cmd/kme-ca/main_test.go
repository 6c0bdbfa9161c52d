package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/qutemail/kme/internal/lab/binaries"
	"github.com/qutemail/kme/internal/lab/freeport"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"kme-ca": main})
}

func TestScripts(t *testing.T) {
	path := string(os.PathListSeparator) + stepDir(t) // last: an older kme-ca may lie there
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("PATH", env.Getenv("PATH")+path)
			for _, name := range []string{"SAE", "SAE_CRL", "KME", "KME_CRL", "OPERATOR", "OPERATOR_CRL"} {
				address, err := freeAddress()
				if err != nil {
					return err
				}
				env.Setenv(name, address)
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"waitfor": waitFor,
			"readenv": readEnv,
		},
	})
}

// waitFor HOST:PORT: until something listens there.
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: waitfor HOST:PORT")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", args[0])
		if err == nil {
			conn.Close()
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			ts.Fatalf("nothing listens at %s: %v", args[0], err)
		}
	}
}

// readEnv NAME FILE: set NAME to what FILE holds.
func readEnv(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: readenv NAME FILE")
	}
	ts.Setenv(args[0], strings.TrimSpace(ts.ReadFile(args[1])))
}

func freeAddress() (string, error) {
	port, err := freeport.Find()
	return fmt.Sprintf("127.0.0.1:%d", port), err
}

// stepDir is the folder of the stock step CLI.
func stepDir(t *testing.T) string {
	t.Helper()
	dir, err := binaries.Step()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

var shellBlocks = regexp.MustCompile("(?s)```sh\n(.*?)```")

// TestReadme runs what pki/README.md asks its reader to paste, in order, on ports
// of this test's own.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile("../../pki/README.md")
	if err != nil {
		t.Fatal(err)
	}
	var script strings.Builder
	for _, block := range shellBlocks.FindAllStringSubmatch(string(text), -1) {
		script.WriteString(block[1])
	}
	commands := script.String()
	if !strings.Contains(commands, "kme-ca init") {
		t.Fatal("the README holds no commands")
	}
	for _, port := range []string{"9441", "9442", "9443", "9451", "9452", "9453"} {
		address, err := freeAddress()
		if err != nil {
			t.Fatal(err)
		}
		commands = strings.ReplaceAll(commands, "127.0.0.1:"+port, address)
	}
	challenge, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	commands = strings.ReplaceAll(commands, "9480", challenge[strings.LastIndex(challenge, ":")+1:])

	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", "trap 'kill $(jobs -p) && wait' EXIT\n"+commands)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "HOME="+dir, "PATH="+os.Getenv("PATH")+string(os.PathListSeparator)+stepDir(t))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
