package main

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/qutemail/kme/internal/saedoor"
)

// TestHarden: a kmed makes no core image, and no other process of its user can look into it.
func TestHarden(t *testing.T) {
	if err := harden(); err != nil {
		t.Fatal(err)
	}
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || dumpable != 0 {
		t.Errorf("dumpable: %d, %v", dumpable, err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0); err != nil { // other tests look at themselves
		t.Error(err)
	}
	var core unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil || core != (unix.Rlimit{}) {
		t.Errorf("core images of %+v bytes, %v", core, err)
	}
}

// TestAnswersAreForgotten: when keys have been answered, over HTTP/1.1 or HTTP/2, nothing of
// them is left in the memory of the process, though the connection is open and the buffers
// that it went through are kept for the next answer. What the process keeps, the search finds.
func TestAnswersAreForgotten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := writeCertificate(dir, "km1"); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "answerer", dir)
	// One collection, when we ask for it: two would empty the pools of buffers. And none of
	// what the runtime saves of registers when it preempts a goroutine.
	cmd.Env = append(os.Environ(), "GOGC=off", "GODEBUG=clobberfree=1,asyncpreemptoff=1")
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
	hear := func() string {
		t.Helper()
		line, err := said.ReadString('\n')
		if err != nil {
			t.Fatalf("the process says %q, %v", line, err)
		}
		return strings.TrimSpace(line)
	}
	address := hear()
	got := make(map[string][]byte) // by what was asked for
	for _, protocol := range []int{1, 2} {
		hc := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, ForceAttemptHTTP2: protocol == 2}}
		defer hc.CloseIdleConnections()
		for _, path := range []string{"/kept/300", "/wiped/97000", "/wiped/14000", "/wiped/4000", "/wiped/4090", "/wiped/300", "/wiped/9000", "/wiped/160"} {
			res, err := hc.Get("https://" + address + path)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(res.Body)
			if err != nil || res.ProtoMajor != protocol {
				t.Errorf("HTTP/%d, %s: %v", res.ProtoMajor, path, err)
			}
			_ = res.Body.Close()
			body = bytes.TrimSpace(body)
			if want := filepath.Base(path); strconv.Itoa(len(body)) != want {
				t.Errorf("HTTP/%d, %s: %d bytes", res.ProtoMajor, path, len(body))
			}
			got[fmt.Sprintf("HTTP/%d %s", protocol, path)] = body
		}
	}
	if _, err := io.WriteString(in, "collect\n"); err != nil {
		t.Fatal(err)
	}
	hear()
	for what, where := range inMemory(t, cmd.Process.Pid, got) {
		if !strings.Contains(what, "kept") {
			t.Errorf("of the answer to %s pieces are left at %s", what, where)
		}
		delete(got, what)
	}
	for what := range got {
		if strings.Contains(what, "kept") {
			t.Errorf("the search does not find the answer to %s, which the process has kept", what)
		}
	}
	if err := errors.Join(in.Close(), cmd.Wait()); err != nil {
		t.Errorf("the process: %v", err)
	}
}

// answerer is the process of TestAnswersAreForgotten: a door that answers with as many random
// letters as it is asked for.
func answerer() {
	if err := answer(os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

func answer(dir string) error {
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		return err
	}
	raw, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	cfg := &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}
	var kept [][]byte
	s := &http.Server{TLSConfig: cfg, ConnContext: none, Handler: new(sweeper).watch(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(filepath.Base(r.URL.Path))
		body := make([]byte, n)
		_, _ = rand.Read(body)
		for i := range body {
			body[i] = 'a' + body[i]%26
		}
		if strings.HasPrefix(r.URL.Path, "/kept") {
			kept = append(kept, bytes.Clone(body))
		}
		x := saedoor.Begin(w, r, r.URL.Path, slog.New(slog.DiscardHandler))
		if err := x.Succeed(saedoor.Answer{Status: http.StatusOK, Body: body, Keys: true}); err != nil {
			log.Print(err)
		}
	}))}
	behindTLS(s)
	served := make(chan error, 1)
	go func() { served <- s.Serve(wiping{shaken{raw, cfg}}) }()
	fmt.Println(raw.Addr())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		runtime.GC()
		fmt.Println("collected")
	}
	runtime.KeepAlive(&kept)
	_ = s.Close()
	if err := <-served; err != http.ErrServerClosed {
		return err
	}
	return nil
}

// inMemory says where in what a process may write to pieces of texts are.
func inMemory(t *testing.T, pid int, texts map[string][]byte) map[string]string {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	const piece = 20
	pieces := make(map[string]string) // of what
	for what, text := range texts {
		for i := 0; i+piece <= len(text); i += piece / 2 {
			pieces[string(text[i:i+piece])] = what
		}
	}
	found := make(map[string]string)
	for line := range strings.Lines(string(maps)) {
		var first, end uint64
		var may string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &first, &end, &may); err != nil {
			t.Fatalf("reading %q: %v", line, err)
		}
		if !strings.HasPrefix(may, "rw") || end-first > 1<<30 {
			continue
		}
		area := make([]byte, end-first)
		n, _ := mem.ReadAt(area, int64(first)) // as far as it is mapped
		letters := 0                           // in a row
		for i, b := range area[:n] {
			if letters++; b < 'a' || b > 'z' {
				letters = 0
			}
			if letters < piece {
				continue
			}
			if what, ok := pieces[string(area[i+1-piece:i+1])]; ok {
				found[what] += fmt.Sprintf("%#x ", first+uint64(i))
			}
		}
	}
	for what, where := range found {
		if all := strings.Fields(where); len(all) > 3 {
			found[what] = fmt.Sprintf("%s and %d more", strings.Join(all[:3], ", "), len(all)-3)
		}
	}
	return found
}
