//go:build ha

package lab

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/qutemail/kme/internal/lab/freeport"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/store"
)

// recipe is what the nodes are made of: the files that an operator uses.
const recipe = "../../deploy/patroni"

// patroni is a database of three nodes, all on loopback.
type patroni struct {
	t       testing.TB
	dir     string
	nodes   []*dbNode
	nursery *nursery
	as      *user.User // whom it runs as; nil: the calling user
}

// dbNode is etcd, Patroni and Postgres of one machine.
type dbNode struct {
	name, dir     string
	vars          map[string]string
	etcd, patroni *process
}

// startPatroni brings up the recipe's cluster in a folder of its own.
func startPatroni(t testing.TB) *patroni {
	t.Helper()
	p := &patroni{t: t, dir: shortDir(t), nursery: newNursery()}
	t.Cleanup(p.nursery.close)
	if os.Geteuid() == 0 { // Postgres will not run as root
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Fatal(err)
		}
		p.as = u
	}
	p.layOut()
	t.Cleanup(p.clear)
	for _, n := range p.nodes {
		n.etcd = p.start(n, "etcd", n.environment(t), "etcd")
	}
	for _, n := range p.nodes {
		n.patroni = p.start(n, "patroni", nil, "patroni", filepath.Join(n.dir, "patroni.yml"))
	}
	eventually(t, "a primary with a synchronous standby and a spare", p.whole)
	return p
}

// layOut chooses ports, makes certificates and fills in the recipe's templates.
func (p *patroni) layOut() {
	p.t.Helper()
	me, err := user.Current()
	must(p.t, err)
	osUser := me
	if p.as != nil {
		osUser = p.as
	}
	path, err := filepath.Abs(recipe)
	must(p.t, err)
	postInit, err := os.ReadFile(filepath.Join(path, "post_init.sh")) // the folder may be closed to that user
	must(p.t, err)
	must(p.t, os.WriteFile(filepath.Join(p.dir, "post_init.sh"), postInit, 0o755))
	bin, err := exec.Command("pg_config", "--bindir").Output()
	if err != nil {
		bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
		bin = []byte(bins[len(bins)-1])
	}
	nodesCA, rolesCA := newAuthority(p.t, "nodes"), newAuthority(p.t, "roles")
	var cluster, hosts []string
	for i := range 3 {
		n := &dbNode{name: fmt.Sprintf("db%d", i+1), vars: make(map[string]string)}
		n.dir = filepath.Join(p.dir, n.name)
		must(p.t, os.MkdirAll(filepath.Join(n.dir, "tls"), 0o755))
		p.nodes = append(p.nodes, n)
		ports := freePorts(p.t, 4)
		n.vars = map[string]string{
			"NODE": n.name, "ADDRESS": "127.0.0.1", "PG_PORT": ports[0], "API_PORT": ports[1], "ETCD_PORT": ports[2], "ETCD_PEER_PORT": ports[3],
			"ETCD_DATA": filepath.Join(n.dir, "etcd"), "DATA": filepath.Join(n.dir, "data"), "BIN": strings.TrimSpace(string(bin)), "RUN": n.dir,
			"TLS": filepath.Join(n.dir, "tls"), "RECIPE": p.dir, "OS_USER": osUser.Username, "ADMIN": me.Username,
		}
		cluster = append(cluster, n.name+"=https://127.0.0.1:"+ports[3])
		hosts = append(hosts, "127.0.0.1:"+ports[2])
		nodesCA.write(filepath.Join(n.vars["TLS"], "nodes-ca.pem"))
		rolesCA.write(filepath.Join(n.vars["TLS"], "roles-ca.pem"))
		nodesCA.issue(n.name, filepath.Join(n.vars["TLS"], "node"))
		rolesCA.issue("replicator", filepath.Join(n.vars["TLS"], "replicator"))
		rolesCA.issue("rewind", filepath.Join(n.vars["TLS"], "rewind"))
	}
	for _, n := range p.nodes {
		n.vars["ETCD_CLUSTER"], n.vars["ETCD_HOSTS"] = strings.Join(cluster, ","), strings.Join(hosts, ",")
		for _, name := range []string{"etcd.env", "patroni.yml"} {
			text, err := os.ReadFile(filepath.Join(recipe, name))
			must(p.t, err)
			must(p.t, os.WriteFile(filepath.Join(n.dir, name), []byte(os.Expand(string(text), func(v string) string {
				if n.vars[v] == "" {
					p.t.Errorf("%s needs %s, which node.env does not have", name, v)
				}
				return n.vars[v]
			})), 0o644))
		}
	}
	p.own()
	clients := filepath.Join(p.dir, "clients") // of this process and kmed, not of the servers
	must(p.t, os.Mkdir(clients, 0o755))
	for _, role := range store.Roles {
		rolesCA.issue(role, filepath.Join(clients, role))
	}
	nodesCA.write(filepath.Join(clients, "nodes-ca.pem"))
}

// own gives what there is in the folder to the user whom the nodes run as.
func (p *patroni) own() {
	if p.as == nil {
		return
	}
	uid, _ := strconv.Atoi(p.as.Uid)
	gid, _ := strconv.Atoi(p.as.Gid)
	must(p.t, filepath.WalkDir(p.dir, func(path string, _ os.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, uid, gid))
	}))
}

// start runs a program of a node as the user.
func (p *patroni) start(n *dbNode, what string, env []string, args ...string) *process {
	p.t.Helper()
	if p.as != nil {
		args = append([]string{"setpriv", "--reuid", p.as.Uid, "--regid", p.as.Gid, "--clear-groups", "--pdeathsig", "TERM", "--"}, args...)
	}
	proc, err := p.nursery.start(what+" of "+n.name, n.dir, filepath.Join(n.dir, what+".log"), append(env, "HOME="+n.dir), args[0], args[1:]...)
	must(p.t, err)
	return proc
}

// environment is what etcd.env says.
func (n *dbNode) environment(t testing.TB) (env []string) {
	text, err := os.ReadFile(filepath.Join(n.dir, "etcd.env"))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "#") {
			env = append(env, strings.TrimSpace(line))
		}
	}
	return env
}

// postmaster is the pid of the node's Postgres, or 0.
func (n *dbNode) postmaster() int {
	text, err := os.ReadFile(filepath.Join(n.vars["DATA"], "postmaster.pid"))
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(text), "\n")
	pid, _ := strconv.Atoi(first)
	return pid
}

// kill ends a machine: Postgres, Patroni and etcd with SIGKILL.
func (n *dbNode) kill(t testing.TB) {
	t.Helper()
	pid := n.postmaster()
	n.patroni.kill() // first: it would notice
	n.etcd.kill()
	if pid == 0 {
		t.Errorf("%s had no postmaster", n.name)
		return
	}
	must(t, syscall.Kill(pid, syscall.SIGKILL))
}

// clear stops what is left: Patroni, which stops Postgres, and then etcd. What a
// killed Patroni has left of Postgres is ended here.
func (p *patroni) clear() {
	if p.t.Failed() {
		for _, n := range p.nodes {
			p.t.Logf("patroni of %s:\n%s", n.name, n.patroni.lastWords())
		}
	}
	var g errgroup.Group
	for _, n := range p.nodes {
		g.Go(n.patroni.stop)
	}
	if err := g.Wait(); err != nil {
		p.t.Error(err)
	}
	for _, n := range p.nodes {
		if err := n.etcd.stop(); err != nil {
			p.t.Error(err)
		}
		if pid := n.postmaster(); pid != 0 && syscall.Kill(pid, syscall.SIGQUIT) == nil {
			eventuallyGone(p.t, pid)
		}
	}
}

func eventuallyGone(t testing.TB, pid int) {
	for range 500 {
		if syscall.Kill(pid, 0) != nil {
			return
		}
		<-time.After(10 * time.Millisecond)
	}
	t.Errorf("process %d did not end", pid)
}

// DSN is how a role reaches the primary: by TLS and with its certificate, as kmed
// does, the superuser by the machines' sockets.
func (p *patroni) DSN(role string) string {
	hosts, ports := make([]string, 3), make([]string, 3)
	for i, n := range p.nodes {
		hosts[i], ports[i] = n.vars["ADDRESS"], n.vars["PG_PORT"]
		if role == pgdev.Superuser {
			hosts[i] = n.vars["RUN"]
		}
	}
	dsn := fmt.Sprintf("host=%s port=%s user=%s dbname=kme target_session_attrs=read-write connect_timeout=2", strings.Join(hosts, ","), strings.Join(ports, ","), role)
	if role == pgdev.Superuser {
		return dsn
	}
	clients := filepath.Join(p.dir, "clients")
	return dsn + fmt.Sprintf(" sslmode=verify-full sslrootcert=%s sslcert=%s.pem sslkey=%[2]s.key", filepath.Join(clients, "nodes-ca.pem"), filepath.Join(clients, role))
}

// roles asks Patroni who is what: leader, sync_standby, replica.
func (p *patroni) roles(ctx context.Context) (map[string]*dbNode, error) {
	var cluster struct {
		Members []struct{ Name, Role, State string }
	}
	var err error
	for _, n := range p.nodes {
		if err = p.ask(ctx, n, &cluster); err == nil {
			break
		}
	}
	roles := make(map[string]*dbNode)
	for _, m := range cluster.Members {
		for _, n := range p.nodes {
			if n.name == m.Name && (m.State == "running" || m.State == "streaming") {
				roles[m.Role] = n
			}
		}
	}
	return roles, err
}

func (p *patroni) ask(ctx context.Context, n *dbNode, answer any) error {
	pair, err := tls.LoadX509KeyPair(filepath.Join(n.vars["TLS"], "node.pem"), filepath.Join(n.vars["TLS"], "node.key"))
	must(p.t, err)
	ca, err := os.ReadFile(filepath.Join(n.vars["TLS"], "nodes-ca.pem"))
	must(p.t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	c := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: roots}}}
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://127.0.0.1:"+n.vars["API_PORT"]+"/cluster", nil)
	must(p.t, err)
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return json.NewDecoder(resp.Body).Decode(answer)
}

// whole is nil when there are a primary, a synchronous standby that may be promoted
// and a spare. Postgres alone would say so too early: until Patroni has noted its
// choice in etcd, nobody may take the primary's place.
func (p *patroni) whole(ctx context.Context) error {
	roles, err := p.roles(ctx)
	if err == nil && len(roles) != 3 {
		err = fmt.Errorf("%d of the roles are taken", len(roles))
	}
	return err
}

// member is the node of a role.
func (p *patroni) member(role string) *dbNode {
	p.t.Helper()
	roles, err := p.roles(p.t.Context())
	must(p.t, err)
	if roles[role] == nil {
		p.t.Fatalf("no node is %s", role)
	}
	return roles[role]
}

func (p *patroni) primary() *dbNode     { return p.member("leader") }
func (p *patroni) synchronous() *dbNode { return p.member("sync_standby") }

// switchover is the planned one, as README.md has it.
func (p *patroni) switchover() {
	p.t.Helper()
	config := filepath.Join(p.nodes[0].dir, "patroni.yml")
	out, err := exec.CommandContext(p.t.Context(), "patronictl", "-c", config, "switchover", "kme",
		"--master", p.primary().name, "--candidate", p.synchronous().name, "--force").CombinedOutput()
	if err != nil {
		p.t.Fatalf("switchover: %v\n%s", err, out)
	}
}

// revive starts a killed machine again.
func (p *patroni) revive(n *dbNode) {
	p.t.Helper()
	n.etcd = p.start(n, "etcd", n.environment(p.t), "etcd")
	n.patroni = p.start(n, "patroni", nil, "patroni", filepath.Join(n.dir, "patroni.yml"))
}

// TestFailover takes KM1's primary away under traffic in both directions: by a
// machine's death, and by a planned switchover, and its synchronous standby too. No
// key is lost or handed out twice, whatever a client was told is so, and every
// commit that was not answered is settled.
func TestFailover(t *testing.T) {
	p := startPatroni(t)
	l := start(t, func(c *Config) {
		c.Database = map[string]func(string) string{"km1": p.DSN}
		c.Filler, c.Interval, c.PoolLimit = 2048, 200*time.Millisecond, 16384
	})
	keysStored(t, l, 4000)
	f := begin(t, l)
	f.flows(t)
	for _, disaster := range []struct {
		name   string
		strike func() (dead *dbNode)
	}{
		{"planned switchover", func() *dbNode { p.switchover(); return nil }},
		{"death of the primary's machine", func() *dbNode { n := p.primary(); n.kill(t); return n }},
		{"death of the synchronous standby's machine", func() *dbNode { n := p.synchronous(); n.kill(t); return n }},
		{"another planned switchover", func() *dbNode { p.switchover(); return nil }},
		{"death of the new primary's machine", func() *dbNode { n := p.primary(); n.kill(t); return n }},
	} {
		eventually(t, "the cluster to be whole", p.whole)
		asked, taken := f.watch(l.KM1)
		dead := disaster.strike()
		f.flows(t)
		t.Logf("%s: no key handed out at KM1 for %.1f s, none taken for %.1f s", disaster.name, asked().Seconds(), taken().Seconds())
		if dead != nil {
			began := time.Now()
			p.revive(dead)
			eventually(t, dead.name+" to be a standby again", p.whole)
			t.Logf("%s was a standby again after %.1f s", dead.name, time.Since(began).Seconds())
		}
	}
	f.close(t)
	log, err := os.ReadFile(l.KM1.LogFile())
	must(t, err)
	doubts := len(regexp.MustCompile("commit not answered").FindAll(log, -1))
	settled := len(regexp.MustCompile("what became of the commit.*fenced=false").FindAll(log, -1))
	t.Logf("%d commits were not answered, %d of them settled", doubts, settled)
	if doubts != settled {
		t.Error("a commit was never settled")
	}
}

// watch measures, until asked, the longest time without a key handed out or taken at
// a site.
func (f *traffic) watch(s *Site) (asked, taken func() time.Duration) {
	gap := func(of func(*route) int64) func() time.Duration {
		stop, result := make(chan struct{}), make(chan time.Duration, 1)
		go func() {
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			var longest time.Duration
			last, since := int64(-1), time.Now()
			for {
				n := int64(0)
				for _, r := range f.routes {
					n += of(r)
				}
				longest = max(longest, time.Since(since))
				if n != last {
					last, since = n, time.Now()
				}
				select {
				case <-tick.C:
				case <-stop:
					result <- longest
					return
				}
			}
		}()
		return func() time.Duration { close(stop); return <-result }
	}
	of := func(count func(*route) int64, at func(*route) *Site) func(*route) int64 {
		return func(r *route) int64 {
			if at(r) != s {
				return 0
			}
			return count(r)
		}
	}
	return gap(of(func(r *route) int64 { return r.served.Load() }, func(r *route) *Site { return r.at })),
		gap(of(func(r *route) int64 { return r.taken.Load() }, func(r *route) *Site { return r.from }))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// freePorts finds ports that nobody listens on.
func freePorts(t testing.TB, n int) (ports []string) {
	for range n {
		ln, err := freeport.Listen()
		must(t, err)
		t.Cleanup(func() { ln.Close() })
		_, port, _ := net.SplitHostPort(ln.Addr().String())
		must(t, ln.Close())
		ports = append(ports, port)
	}
	return ports
}

// authority is a CA of the cluster's.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	sn   int64
}

func newAuthority(t testing.TB, name string) *authority {
	a := &authority{t: t, cert: &x509.Certificate{
		Subject: pkix.Name{CommonName: name + " CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	a.cert, a.key = a.sign(a.cert, nil)
	return a
}

// sign completes a certificate with a key of its own.
func (a *authority) sign(c *x509.Certificate, by *authority) (*x509.Certificate, *ecdsa.PrivateKey) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(a.t, err)
	a.sn++
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(a.sn), time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
	parent, signer := c, key
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	must(a.t, err)
	signed, err := x509.ParseCertificate(der)
	must(a.t, err)
	return signed, key
}

func (a *authority) write(file string) {
	must(a.t, os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o644))
}

// issue writes path.pem and path.key, for a role or a node at 127.0.0.1.
func (a *authority) issue(cn, path string) {
	cert, key := a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: cn}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, a)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(a.t, err)
	must(a.t, os.WriteFile(path+".pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}), 0o644))
	must(a.t, os.WriteFile(path+".key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
}
