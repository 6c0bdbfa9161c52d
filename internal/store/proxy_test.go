package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/qutemail/kme/internal/audit"
)

// cutHow is what a proxy does to a connection that sends COMMIT.
type cutHow int

const (
	pass cutHow = iota
	// loseRequest: cut before the COMMIT reaches the server.
	loseRequest
	// loseAnswer: let the server commit, and cut before it is heard.
	loseAnswer
	// delayRequest: cut the client, and deliver the COMMIT only after the next
	// connection has begun to delete atoms.
	delayRequest
)

// proxy stands between a DB and the server, and reads what is said.
type proxy struct {
	t      testing.TB
	ln     net.Listener
	server string // the server's socket
	mu     sync.Mutex
	how    cutHow // of the next COMMIT
	cuts   int
	late   chan struct{} // closed when a delayed COMMIT may be delivered
	all    sync.WaitGroup

	clients   []net.Conn
	cancels   int // CancelRequests
	farewells int // Terminates
}

// newProxy returns a proxy and the DSN through which it is used.
func newProxy(t testing.TB, s *site) (*proxy, string) {
	t.Helper()
	dir := t.TempDir()
	ln, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, ln: ln, server: s.cluster.Socket(), late: make(chan struct{})}
	p.all.Go(p.accept)
	t.Cleanup(func() {
		ln.Close()
		p.all.Wait()
	})
	return p, "host=" + dir + " port=5432 sslmode=disable user=" + AppRole + " dbname=" + s.name
}

func (p *proxy) accept() {
	for {
		client, err := p.ln.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("unix", p.server)
		if err != nil {
			client.Close()
			continue
		}
		p.mu.Lock()
		p.clients = append(p.clients, client)
		p.mu.Unlock()
		deaf := make(chan struct{}) // closed: what the server says is not passed on
		p.all.Go(func() { p.answers(client, server, deaf) })
		p.all.Go(func() { p.requests(client, server, deaf) })
	}
}

// cancelRequest stands where a startup message has the protocol's version.
const cancelRequest = 80877102

// cut breaks the connections that there are.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.clients {
		c.Close()
	}
	p.clients = nil
}

// answers passes on what the server says, until deaf.
func (p *proxy) answers(client, server net.Conn, deaf chan struct{}) {
	defer client.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := server.Read(buf)
		if err != nil {
			return
		}
		select {
		case <-deaf:
		default:
			if _, err := client.Write(buf[:n]); err != nil {
				return
			}
		}
	}
}

// requests passes on what the client says, message by message.
func (p *proxy) requests(client, server net.Conn, deaf chan struct{}) {
	defer server.Close()
	var head [4]byte
	if _, err := io.ReadFull(client, head[:]); err != nil { // the startup message has no type
		return
	}
	body := make([]byte, binary.BigEndian.Uint32(head[:])-4)
	if _, err := io.ReadFull(client, body); err != nil {
		return
	}
	if binary.BigEndian.Uint32(body) == cancelRequest {
		p.mu.Lock()
		p.cancels++
		p.mu.Unlock()
	}
	if _, err := server.Write(append(head[:], body...)); err != nil {
		return
	}
	prepared := make(map[string]string)
	for {
		message, sql, err := readMessage(client, prepared)
		if err != nil {
			return
		}
		if message[0] == 'X' {
			p.mu.Lock()
			p.farewells++
			p.mu.Unlock()
		}
		switch p.judge(sql) {
		case loseRequest:
			client.Close()
			return
		case loseAnswer:
			close(deaf)
			if _, err := server.Write(message); err == nil {
				if err := passThrough(client, server, prepared); err == nil {
					// The server has all of it. It ends the connection when it has done it.
					_, _ = server.Write([]byte{'X', 0, 0, 0, 4})
				}
			}
			p.awaitEnd(client)
			return
		case delayRequest:
			var rest bytes.Buffer
			rest.Write(message)
			if err := passThrough(client, &rest, prepared); err != nil {
				p.t.Error(err)
			}
			client.Close()
			<-p.late
			_, _ = server.Write(rest.Bytes())
			return
		}
		if _, err := server.Write(message); err != nil {
			return
		}
	}
}

// judge says what becomes of a statement.
func (p *proxy) judge(sql string) cutHow {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cuts > 0 && bytes.HasPrefix([]byte(sql), []byte("DELETE FROM key_e")) {
		select {
		case <-p.late:
		default:
			close(p.late)
		}
	}
	if sql != "COMMIT" || p.how == pass {
		return pass
	}
	how := p.how
	p.how = pass
	p.cuts++
	return how
}

func (p *proxy) arm(how cutHow) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.how = how
}

// awaitEnd reads until the client is closed by answers, which sees the server's end.
func (p *proxy) awaitEnd(client net.Conn) { _, _ = io.Copy(io.Discard, client) }

// passThrough passes messages on up to the next Sync.
func passThrough(client io.Reader, to io.Writer, prepared map[string]string) error {
	for {
		message, _, err := readMessage(client, prepared)
		if err != nil {
			return err
		}
		if _, err := to.Write(message); err != nil {
			return err
		}
		if message[0] == 'S' {
			return nil
		}
	}
}

// readMessage reads one message of the client's, and the statement that it binds.
func readMessage(client io.Reader, prepared map[string]string) (message []byte, sql string, err error) {
	head := make([]byte, 5)
	if _, err := io.ReadFull(client, head); err != nil {
		return nil, "", err
	}
	message = append(head, make([]byte, binary.BigEndian.Uint32(head[1:])-4)...)
	if _, err := io.ReadFull(client, message[5:]); err != nil {
		return nil, "", err
	}
	switch parts := bytes.SplitN(message[5:], []byte{0}, 3); message[0] {
	case 'P': // name, statement
		prepared[string(parts[0])] = string(parts[1])
	case 'B': // portal, name
		sql = prepared[string(parts[1])]
	}
	return message, sql, nil
}

// TestUnknownCommit cuts the connection at the COMMIT of a Serve, in three ways,
// while another session waits behind it. The caller is told what became of it.
func TestUnknownCommit(t *testing.T) {
	t.Parallel()
	for name, how := range map[string]cutHow{"request lost": loseRequest, "answer lost": loseAnswer, "request late": delayRequest} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			p, dsn := newProxy(t, s)
			cfg := s.config("n1")
			cfg.DSN = dsn
			db := s.openWith(cfg)
			b := s.fill(db, 64, mine)
			serve := func(i int) error {
				return db.Serve(t.Context(), ServeJob{Atoms: ids(b.Atoms[i : i+1]), Events: []audit.Event{served("r", b.BlockRef, b.Atoms[i])}})
			}
			if err := serve(0); err != nil {
				t.Fatal(err)
			}
			p.arm(how)
			if err := serve(1); err != nil {
				t.Errorf("the request that was cut: %v, want it done", err)
			}
			if err := serve(2); err != nil {
				t.Errorf("the next request: %v", err)
			}
			if p.cuts != 1 {
				t.Errorf("%d commits were cut, want 1", p.cuts)
			}
			if err := db.Healthy(); err != nil {
				t.Error(err)
			}
			if n := countOf(s.check(), audit.EncKeys); n != 3 {
				t.Errorf("%d requests were recorded, want 3", n)
			}
			if n, _ := db.Stored(t.Context(), linkName); n != 61 {
				t.Errorf("%d atoms are left, want 61", n)
			}
		})
	}
}

// TestUnknownCommitOfTheFenced: when a run was taken over while its commit was in
// doubt, the old process can say nothing about it.
func TestUnknownCommitOfTheFenced(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	p, dsn := newProxy(t, s)
	cfg := s.config("n1")
	cfg.DSN = dsn
	db := s.openWith(cfg)
	b := s.fill(db, 64, mine)
	heir := s.open("n2")
	p.arm(loseAnswer)
	p.ln.Close() // nobody gets through any more
	got := make(chan error, 1)
	go func() {
		got <- db.Serve(t.Context(), ServeJob{
			Atoms: ids(b.Atoms[:1]), Events: []audit.Event{served("r", b.BlockRef, b.Atoms[0])}, Late: func(bool) { t.Error("Late of an unknown outcome") },
		})
	}()
	s.await("the node to notice", func() bool { return db.Healthy() != nil })
	if err := db.Record(t.Context(), audit.Event{}); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a job that comes meanwhile: %v, want ErrUnavailable", err)
	}
	if _, err := heir.BumpRun(t.Context(), "n1", 0); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(p.ln.Addr().String())
	ln, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p.ln = ln
	p.all.Go(p.accept)
	if err := <-got; !errors.Is(err, ErrFenced) {
		t.Errorf("Serve: %v, want ErrFenced", err)
	}
	<-db.Fenced()
	s.check()
}

// TestReconnects ends the committer's connection in the middle of a batch and
// while it is idle: nothing happened, and the batch is simply done again.
func TestReconnects(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	db := s.open("n1")
	b := s.fill(db, 64, mine)
	terminate := func() int {
		return ask[int](s, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND usename = '"+AppRole+"'")
	}
	if n := terminate(); n == 0 {
		t.Fatal("no connection was ended")
	}
	if err := db.Serve(t.Context(), ServeJob{Atoms: ids(b.Atoms[:1]), Events: []audit.Event{served("idle", b.BlockRef, b.Atoms[0])}}); err != nil {
		t.Errorf("after the idle connection was ended: %v", err)
	}
	unlock := s.lockNode("n1")
	got := make(chan error, 1)
	go func() {
		got <- db.Serve(t.Context(), ServeJob{Atoms: ids(b.Atoms[1:2]), Events: []audit.Event{served("busy", b.BlockRef, b.Atoms[1])}})
	}()
	s.awaitLock()
	terminate()
	unlock()
	if err := <-got; err != nil {
		t.Errorf("when the connection was ended before its COMMIT: %v", err)
	}
	if n := countOf(s.check(), audit.EncKeys); n != 2 {
		t.Errorf("%d requests were recorded, want 2", n)
	}
}
