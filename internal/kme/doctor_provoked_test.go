package kme

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/qutemail/kme/deploy/runbooks"
	"github.com/qutemail/kme/hsm/hsmtest"
	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/audit"
	"github.com/qutemail/kme/internal/distill"
	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/peer"
	"github.com/qutemail/kme/internal/pgdev"
	"github.com/qutemail/kme/internal/qlink"
	"github.com/qutemail/kme/internal/store"
)

// TestDoctorProvoked: each thing that a node depends on is made to fail, and doctor says of
// it what stands in deploy/runbooks/doctor.md, and what to do. What can be mended is, and
// doctor finds all well again.
func TestDoctorProvoked(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	for _, trouble := range []func(){
		p.peer, p.hsm, p.database, p.schema, p.dataFolder, p.link, // mended at the end of each
		p.keys, p.node, p.trail, p.restored, // left as they are
	} {
		if trouble(); t.Failed() {
			return // what follows would only say so again
		}
	}
	for what := range p.rows {
		t.Errorf("nothing makes %q happen", what)
	}
}

// patient is a node of km1 that runs, with all that it depends on: the database of a site, a
// token behind a module that misbehaves when told, a folder, and km2, which stands at the
// other end of a link.
type patient struct {
	*testing.T
	*site
	k      *KME
	km2    *farSite
	module *hsmtest.Module
	tokens string // folder of the token
	dir    string // folder of the node
	fibre  channel
	rows   map[string]runbooks.Complaint // not provoked yet
	asked  int                           // how often with a key to be compared
}

// newPatient starts the node while its peer is away.
func newPatient(t *testing.T) *patient {
	t.Helper()
	s, dir := newSite(t), tokenDir(t)
	p := &patient{T: t, site: s, tokens: filepath.Join(dir, "tokens"), dir: filepath.Join(t.TempDir(), "data"), rows: runbooks.Complaints(runbooks.Node)}
	p.must(os.Mkdir(p.dir, 0o700))
	plain := p.withToken(dir, func(c *Config) {
		c.Token, p.module = faultyToken(t, dir)
		c.PoolLimit = 8 * key.ChunkAtoms
		c.Trail.Sequencer = p.cluster.DSN(store.SequencerRole, p.name)
	})
	p.km2 = p.far(plain, "km2", "fibre", "bob")
	stand(t, p.km2.k)

	c := plain.Config
	c.Node, c.DataDir, c.Store = "km1-a", p.dir, p.connectAs("km1-a", p.dir)
	c.linked(p.km2)
	c.Links[0].Dial = p.fibre.dial
	var err error
	p.k, err = New(c)
	p.must(err)
	for _, k := range []*KME{p.k, p.km2.k} {
		l := k.links["fibre"]
		l.Filler, l.Interval, l.Random = 4*key.ChunkAtoms, 50*time.Millisecond, rand.Reader
	}
	p.fibre.answer = func(ctx context.Context, s *peer.Stream) { p.km2.k.Classical(ctx, p.k.Self, s) }
	t.Cleanup(p.fibre.close)

	p.km2.shut.Store(true)
	run(t, p.k)
	p.says("the peer is away", "a start while the peer is away")
	p.km2.shut.Store(false)
	p.says("an alarm stands") // see well
	p.well()
	return p
}

// channel is the classical channel between the ends of a link. It may be cut.
type channel struct {
	answer func(context.Context, *peer.Stream) // at Bob's end
	ends   sync.WaitGroup

	mu   sync.Mutex
	cut  bool
	open []*peer.Stream
}

func (f *channel) dial(ctx context.Context) (*peer.Stream, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cut {
		return nil, errors.New("the fibre is cut")
	}
	a, b := net.Pipe()
	hers, his := peer.NewStream(a, nil), peer.NewStream(b, nil)
	f.open = append(f.open, hers, his)
	f.ends.Go(func() { f.answer(ctx, his) })
	return hers, nil
}

// close cuts it, and mend ends that.
func (f *channel) close() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cut = true
	for _, s := range f.open {
		s.Close()
	}
	f.open = nil
	f.ends.Wait()
}

func (f *channel) mend() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cut = false
}

func (p *patient) must(err error) {
	p.Helper()
	if err != nil {
		p.Fatal(err)
	}
}

// look asks the node as somebody who may only look.
func (p *patient) look() []admin.Finding {
	return p.ask(asOne(p, identity.RoleOperator, "olga", p.now(), identity.Viewer))
}

// compare asks it as an operator who may act, another one each time: one may have so many
// keys compared.
func (p *patient) compare() []admin.Finding {
	p.asked++
	return p.ask(asOne(p, identity.RoleOperator, fmt.Sprint("root", p.asked), p.now(), identity.Operating))
}

func (p *patient) ask(c identity.Caller) []admin.Finding {
	p.Helper()
	found, err := p.k.OperatorDoor().Doctor(p.Context(), c, "r")
	p.must(err)
	return found
}

// well waits until everything is, but for the alarm that the token has KEKs that km1 does
// not know: those of km2.
func (p *patient) well() {
	p.Helper()
	var bad []admin.Finding
	defer func() {
		if p.Failed() {
			p.Logf("not well: %+v", bad)
		}
	}()
	eventually(p, "all to be well", func() bool {
		bad = slices.DeleteFunc(p.look(), func(f admin.Finding) bool { return f.OK || f.Says == "1: [kek-unknown]" })
		return len(bad) == 0
	})
}

// says waits until each of the rows is said, and comparing until it is to an operator who
// has a key compared.
func (p *patient) says(rows ...string)      { p.Helper(); p.saysTo(p.look, rows...) }
func (p *patient) comparing(rows ...string) { p.Helper(); p.saysTo(p.compare, rows...) }

func (p *patient) saysTo(ask func() []admin.Finding, rows ...string) {
	p.Helper()
	for _, what := range rows {
		want, ok := p.rows[what]
		if delete(p.rows, what); !ok {
			p.Fatalf("doctor.md has no row %q", what)
		}
		var found []admin.Finding
		defer func() {
			if p.Failed() {
				p.Logf("%s: %+v", what, found)
			}
		}()
		eventually(p, what, func() bool {
			found = ask()
			return slices.ContainsFunc(found, func(f admin.Finding) bool { return !f.OK && want.Is(f.About, f.Says, f.Do) == nil })
		})
	}
}

func (p *patient) peer() {
	p.km2.delay.Store(int64(peerSlow + peerSlow/4))
	p.says("the peer is slow")
	p.km2.delay.Store(0)
	p.km2.ahead.Store(int64(clockLimit + time.Second))
	p.says("the clocks of the sites differ", "the link makes no keys for now")
	p.km2.ahead.Store(0)
	p.well()
	if !slices.ContainsFunc(p.compare(), func(f admin.Finding) bool { return f.OK && f.About == "keys of fibre" }) {
		p.Error("no key was compared while all is well")
	}
	const burned = "SELECT count(*) FROM kme.audit WHERE body::json->>'action' = 'burn'"
	if here, there := p.site.ask(burned), p.km2.ask(burned); here != 1 || there != 1 {
		p.Errorf("%d keys are burned here and %d at the peer, want the one that was compared", here, there)
	}
}

func (p *patient) hsm() {
	p.must(os.Rename(p.tokens, p.tokens+".away"))
	p.says("the HSM's token is gone")
	p.comparing("no key can be compared")
	p.must(os.Rename(p.tokens+".away", p.tokens))
	p.well()
	p.module.Slow(hsmtest.GetTokenInfo, hsmSlow+hsmSlow/4)
	p.says("the HSM is slow")
	p.module.Heal()
	p.well()
}

func (p *patient) database() {
	p.exec("postgres", "ALTER DATABASE "+p.name+" ALLOW_CONNECTIONS false")
	p.hangUp("")
	p.says("the database is gone", "the database is gone: the schema", "the database is gone: the link", "the database is gone: the audit")
	p.exec("postgres", "ALTER DATABASE "+p.name+" ALLOW_CONNECTIONS true")
	p.well()

	ctx, cancel := context.WithCancel(p.Context())
	var locks sync.WaitGroup
	locks.Go(func() {
		conn, err := pgx.Connect(ctx, p.cluster.DSN(pgdev.Superuser, p.name))
		if err != nil {
			p.Error(err)
			return
		}
		defer conn.Close(context.WithoutCancel(ctx))
		hold := fmt.Sprintf("BEGIN; LOCK TABLE kme.settings IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(%g); ROLLBACK", 1.5*databaseSlow.Seconds())
		for ctx.Err() == nil {
			_, _ = conn.Exec(ctx, hold) // the last is cut short
		}
	})
	p.says("the database is slow")
	cancel()
	locks.Wait()
	p.well()
}

// schema: as an older or a newer release needs it.
func (p *patient) schema() {
	p.change("UPDATE goose_db_version SET is_applied = false WHERE version_id = (SELECT max(version_id) FROM goose_db_version)")
	p.says("the schema is old")
	p.change("UPDATE goose_db_version SET is_applied = true")
	p.change("INSERT INTO goose_db_version (version_id, is_applied) VALUES (99999, true)")
	p.says("the schema is newer")
	p.change("DELETE FROM goose_db_version WHERE version_id = 99999")
	p.well()
}

func (p *patient) dataFolder() {
	p.must(os.Rename(p.dir, p.dir+".away"))
	p.says("the data folder is gone")
	p.must(os.Symlink("/proc", p.dir)) // without any room, and nobody makes files there
	p.says("the disk is full", "the data folder takes no writes")
	p.must(os.Remove(p.dir))
	p.must(os.Rename(p.dir+".away", p.dir))
	p.well()
}

func (p *patient) link() {
	l := p.k.links["fibre"]
	l.aborted(p.Context(), qlink.Block{Outcome: distill.Outcome{Session: 1, Block: 1000}}, &distill.Abort{Reason: "too many errors", QBER: 0.12})
	p.says("somebody on the line")
	p.more()
	p.well()
	p.fibre.close()
	p.more()
	p.says("the link is down")
	p.fibre.mend()
	p.well()
	p.exec(p.name, "CREATE TABLE kme.ours AS SELECT id FROM kme.chunk WHERE owner = 'here'")
	p.change("UPDATE chunk SET owner = 'peer' WHERE owner = 'here'") // and the link is full
	p.says("the pool is empty")
	p.change("UPDATE chunk SET owner = 'here' WHERE id IN (SELECT id FROM ours)")
	p.well()
}

// more hands keys out until the link has made another block, or found that it cannot.
func (p *patient) more() {
	p.Helper()
	state := func() LinkState { return p.k.LinkStates()[0] }
	before, delivered := state().Blocks, make(map[key.ID]int)
	eventually(p, "a block, or none", func() bool {
		_ = p.km2.deliver(p.T, p.k, 32, delivered) // there may be too few, or an announce in doubt
		now := state()
		return now.Blocks > before || now.State == admin.LinkDown
	})
}

// keys: those of km1 are other ones at km2, and then none.
func (p *patient) keys() {
	p.must(p.otherBytes())
	p.comparing("the peer has other bytes")
	p.km2.change("DELETE FROM key")
	p.comparing("the peer lacks a key")
}

// otherBytes seals other bytes for every key that km2 has in its pool, as somebody can who
// has its token, the PIN and the database.
func (p *patient) otherBytes() error {
	conn, err := pgx.Connect(p.Context(), p.cluster.DSN(pgdev.Superuser, p.km2.name)+" search_path=kme")
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(p.Context()))
	type atom struct {
		ID         [16]byte
		Index      int
		KEK        int64
		Session    int64
		Block      int64
		Provenance string
	}
	rows, _ := conn.Query(p.Context(), `SELECT key.id, index, kek, chunk.session, chunk.block, provenance
		FROM key JOIN chunk ON chunk.id = chunk JOIN block ON (block.link, block.session, block.id) = (chunk.link, chunk.session, chunk.block)`)
	atoms, err := pgx.CollectRows(rows, pgx.RowToStructByPos[atom])
	if err != nil || len(atoms) == 0 {
		return fmt.Errorf("%d keys in the pool: %w", len(atoms), err)
	}
	var changes pgx.Batch
	for _, a := range atoms {
		kek, err := p.km2.k.keks.byID(p.Context(), a.KEK)
		if err != nil {
			return err
		}
		other := make([]byte, key.AtomBytes)
		_, _ = rand.Read(other) // never fails
		ref := handover.BlockRef{Link: "fibre", Session: a.Session, Block: a.Block}
		iv, ct, err := kek.Wrap(p.Context(), other, AtomAAD(nil, p.km2.k.Self, a.KEK, ref, a.Index, a.ID, key.Provenance(a.Provenance)))
		if err != nil {
			return err
		}
		changes.Queue("UPDATE key SET iv = $1, ct = $2 WHERE id = $3", iv[:], ct, a.ID)
	}
	return conn.SendBatch(p.Context(), &changes).Close()
}

// node: another one of the site ends and leaves a lease, which only the peer can say the
// truth about.
func (p *patient) node() {
	const second = `, {name: km1-b, sae: "localhost:15", assign: "localhost:16", classical: "localhost:17", operator: "localhost:18"}]}`
	p.k.Live.Replace(policySet(p, strings.Replace(network, "]}", second, 1), rules)) // km2's too
	b := p.beside(p.k, "km1-b")
	stand(p.T, b)
	if lends, err := b.links["fibre"].pool.take(p.Context(), 1, 1); err != nil || len(lends) != 1 {
		p.Fatalf("%d keys in hand, %v", len(lends), err)
	}
	p.must(b.Store.Beat(p.Context()))
	eventually(p, "the other node to be seen", func() bool {
		return slices.ContainsFunc(p.look(), func(f admin.Finding) bool { return f.OK && f.About == "node km1-b" })
	})
	p.km2.shut.Store(true)
	p.must(b.Store.Stop(p.Context(), nil, false))
	p.says("a node of the site died, and the peer is away")
	p.km2.shut.Store(false)
	p.says("a node of the site died")
}

// trail: nothing folds the events into the tree; when something does again, one of those
// that waited is another.
func (p *patient) trail() {
	p.exec("postgres", fmt.Sprintf("REVOKE CONNECT ON DATABASE %s FROM PUBLIC; GRANT CONNECT ON DATABASE %[1]s TO %s", p.name, store.AppRole))
	p.hangUp(store.SequencerRole)
	p.k.note(p.Context(), p.k.own(audit.Alarm))
	p.step(lagAlarm + time.Second)
	p.says("the audit log's keeping fails")
	p.change(`UPDATE audit SET body = replace(body, '"km1-a"', '"km1-z"') WHERE node = 'km1-a' AND seq > (SELECT seq FROM audit_node WHERE node = 'km1-a')`)
	p.exec("postgres", "GRANT CONNECT ON DATABASE "+p.name+" TO "+store.SequencerRole)
	p.says("the audit log was changed")

	// A node that has not looked since: then it says so by itself.
	s := newSite(p)
	k, q := s.trailed()
	_, err := q.Step(p.Context())
	p.must(err)
	k.note(p.Context(), k.own(audit.Alarm))
	s.step(lagAlarm + time.Second)
	p.saysTo(func() []admin.Finding { return []admin.Finding{k.examineTrail(p.Context())} }, "events are not folded into the audit log")
}

// restored: the site is suspended, until it is recovered.
func (p *patient) restored() {
	p.change("UPDATE settings SET suspended = 'the database is older than the witness file'")
	p.says("the database was restored")
}

// hangUp ends the sessions of a role, or of all, at the site's database.
func (p *patient) hangUp(role string) {
	p.exec("postgres", fmt.Sprintf("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '%s' AND usename LIKE '%s%%'", p.name, role))
}
