//go:build cgo

package hsm

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
)

// asKeeper, in the environment, is set in a process that has a link's secret in its hands
// and then does not: the module, the token and its PIN file.
const asKeeper = "KME_HSM_TEST_KEEPER"

// TestNoSecretInMemory: when a link's secret has been kept in the token, and read from it,
// and its buffers are wiped, no copy is left in the memory of the process, the C heap
// included. As long as its buffer is there the search finds it.
func TestNoSecretInMemory(t *testing.T) {
	b := newBench(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), asKeeper+"="+strings.Join([]string{b.cfg.Module, b.cfg.TokenLabel, b.cfg.PINFile}, ":"))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	said := bufio.NewReader(stdout)
	hear := func(want string) {
		t.Helper()
		if got, err := said.ReadString('\n'); got != want+"\n" {
			t.Fatalf("the process says %q, %v, want %q", got, err, want)
		}
	}
	hear("kept")
	secret, err := b.open(t).AuthSecret(t.Context(), "link")
	if err != nil {
		t.Fatal(err)
	}
	search := func() (found []string) {
		t.Helper()
		found, err := inMemory(cmd.Process.Pid, secret)
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	if found := search(); len(found) == 0 {
		t.Error("the search does not find the secret where it is")
	}
	if _, err := io.WriteString(in, "\n"); err != nil {
		t.Fatal(err)
	}
	hear("wiped")
	for _, where := range search() {
		t.Errorf("some of the secret is left in %s", where)
	}
	if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
		t.Errorf("the process: %v", err)
	}
}

// keeper is the process of TestNoSecretInMemory.
func keeper(what string) error {
	parts := strings.Split(what, ":")
	ctx := context.Background()
	token, err := Open(ctx, Config{Module: parts[0], TokenLabel: parts[1], PINFile: parts[2]})
	if err != nil {
		return err
	}
	secret, err := token.NewAuthSecret(ctx)
	if err == nil {
		err = token.SetAuthSecret(ctx, "link", secret)
	}
	if err != nil {
		return err
	}
	fmt.Println("kept")
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return err
	}
	read, err := token.AuthSecret(ctx, "link")
	if err != nil || !bytes.Equal(read, secret) {
		return fmt.Errorf("it is another secret now, or: %w", err)
	}
	clear(secret)
	clear(read)
	runtime.KeepAlive(secret)
	fmt.Println("wiped")
	_, _ = io.Copy(io.Discard, os.Stdin) // until it is closed
	return token.Close()
}

// inMemory says where in what a process may write to there is a piece of secret.
func inMemory(pid int, secret []byte) (found []string, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	for line := range strings.Lines(string(maps)) {
		var first, end uint64
		var may string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &first, &end, &may); err != nil {
			return nil, fmt.Errorf("reading %q: %w", line, err)
		}
		if !strings.HasPrefix(may, "rw") {
			continue
		}
		const chunk = 1 << 20
		buf := make([]byte, chunk+len(secret))
		for at := first; at < end; at += chunk {
			n, err := mem.ReadAt(buf[:min(uint64(len(buf)), end-at)], int64(at))
			if err != nil && !errors.Is(err, syscall.EIO) { // that: it is not mapped any more
				return nil, err
			}
			const piece = 32
			for i := 0; i+piece <= len(secret); i += piece {
				if bytes.Contains(buf[:n], secret[i:i+piece]) {
					found = append(found, fmt.Sprintf("%s (piece %d)", strings.TrimSpace(line), i/piece))
					break
				}
			}
		}
	}
	return found, nil
}
