package audit

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// LogKey is the public key of a site's log, and with it all that is needed to verify
// the log: it signs the checkpoints of each origin, and vouches for the nodes' keys.
type LogKey struct {
	note.Verifier        // of checkpoints
	Site          string // the name without the origin's number, under which it vouches
	Origin        int64  // of the site's account: a later one begins in the middle of the nodes' chains
	nodes         note.Verifier
	public        ed25519.PublicKey
}

// SamePublic says whether two logs have one key: those of two origins of a site do.
func (k LogKey) SamePublic(other LogKey) bool { return k.public.Equal(other.public) }

// LogName is the name of a site's log in an origin of its account.
func LogName(trustDomain, site string, origin int64) string {
	return fmt.Sprintf("%s/%s/audit/%d", trustDomain, site, origin)
}

// VouchName is the name under which the log's key vouches for nodes, whatever the origin.
func VouchName(logName string) string {
	if i := strings.LastIndexByte(logName, '/'); i > 0 {
		return logName[:i]
	}
	return logName
}

// OpenEarlier reads a checkpoint of the site's log of an origin before this key's. That
// log has the same key under another name.
func (k LogKey) OpenEarlier(signed string) (Checkpoint, error) {
	name, _, _ := strings.Cut(signed, "\n")
	if VouchName(name) != k.Site {
		return Checkpoint{}, fmt.Errorf("%.80q is no log of %s", name, k.Site)
	}
	earlier, err := ParseLogKey(verifierKey(name, algorithmEd25519, k.public))
	if err != nil {
		return Checkpoint{}, err
	}
	if earlier.Origin >= k.Origin {
		return Checkpoint{}, fmt.Errorf("log %s is not before %s", name, k.Name())
	}
	c, _, err := OpenCheckpoint([]byte(signed), earlier)
	return c, err
}

// ParseLogKey reads the verifier key of a log.
func ParseLogKey(vkey string) (LogKey, error) {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return LogKey{}, fmt.Errorf("reading the verifier key of a log: %.80q is none: %w", vkey, err)
	}
	public, err := publicOf(vkey)
	if err != nil {
		return LogKey{}, err
	}
	site := VouchName(v.Name())
	origin, err := strconv.ParseInt(strings.TrimPrefix(v.Name(), site+"/"), 10, 64)
	if err != nil || origin < 1 {
		return LogKey{}, fmt.Errorf("reading the verifier key of a log: %q does not end in the number of an origin", v.Name())
	}
	nodes, err := note.NewVerifier(verifierKey(site, algorithmEd25519, public))
	if err != nil {
		return LogKey{}, fmt.Errorf("reading the verifier key of a log: %w", err)
	}
	return LogKey{Verifier: v, Site: site, Origin: origin, nodes: nodes, public: public}, nil
}

// NodeKey is the key that a note vouches for as that of a node.
func (k LogKey) NodeKey(signed, node string) (ed25519.PublicKey, error) {
	return OpenNodeKeyNote(signed, k.nodes, node)
}

// BadLeaf is the first event that is not as it was recorded.
type BadLeaf struct {
	Leaf int64 // -1: it is not in the tree
	Node string
	Seq  int64 // 0: not known
	Why  string
}

// Error names it.
func (b *BadLeaf) Error() string {
	where := fmt.Sprintf("leaf %d", b.Leaf)
	if b.Leaf < 0 {
		where = "not in the tree yet"
	}
	if b.Seq == 0 {
		return fmt.Sprintf("first bad leaf: %s: %s", where, b.Why)
	}
	return fmt.Sprintf("first bad leaf: event %d of node %s (%s): %s", b.Seq, b.Node, where, b.Why)
}

// Source is where a log is read from: a database, a bundle or a door. Nothing that it
// says is believed.
type Source interface {
	TileSource
	// Rows calls do for the leaves from first up to, and without, end, in order.
	Rows(ctx context.Context, first, end int64, do func(Row) error) error
	// Tail calls do for the events that are not in the tree yet, those of each node in order.
	Tail(ctx context.Context, do func(Row) error) error
	// NodeKeys are the notes that vouch for the nodes' keys (SignNodeKey), by node: the
	// events that name them may be in bundles.
	NodeKeys(ctx context.Context) (map[string]string, error)
}

// Report is what was verified.
type Report struct {
	First  int64           // leaf
	Leaves int64           // in the tree, from First on
	Tail   int64           // beyond it, signed by their nodes
	Heads  map[string]Head // where the chain of each node ends
	// Follows are the last checkpoints of the site's logs before this one that the log
	// names, each signed by its log: of a log that was begun by a recovery.
	Follows []Checkpoint
	// Archived are the bundles that the log names, where leaves went of it and of the
	// site's logs before it.
	Archived []Archived
	// Begins is, of each node, the head of its chain before the first event that was
	// verified: where the chain ends of what is before, which may be in a bundle.
	Begins map[string]Head
	// Cosigned is how many leaves the witnesses have signed for that VerifyBundle names.
	Cosigned int64
}

// Verify reads the leaves from first on, up to the checkpoint, and then what is not in
// the tree yet, and compares all of it with the checkpoint, which the log has signed:
// the text of each event with its leaf, the leaves with the root, the chain of each
// node, and the signatures over its head. Its error is, or wraps, a *BadLeaf if the log
// is not as it was recorded, or as is known from elsewhere.
func Verify(ctx context.Context, key LogKey, c Checkpoint, first int64, known Known, src Source) (Report, error) {
	return verify(ctx, key, c, first, c.Size, known, src)
}

// Known is what is known of a log from elsewhere.
type Known struct {
	Heads       map[string]Head // of nodes: what a node's witness file says, or another site
	Checkpoints []Checkpoint    // that a witness has seen, the log's signature verified
	Earlier     []Checkpoint    // that a witness has last seen of the logs before, likewise (LogKey.OpenEarlier)
	Archived    []Archived      // leaves of this log that a later log of the site says are in bundles (Report.Archived of that one)
}

// verify is Verify of the leaves up to, and without, end.
func verify(ctx context.Context, key LogKey, c Checkpoint, first, end int64, known Known, src Source) (Report, error) {
	v := &verification{key: key, chains: NewChains(key), expect: maps.Clone(known.Heads), seen: make(map[int64]tlog.Hash), earlier: known.Earlier, src: src}
	for _, seen := range known.Checkpoints {
		if seen.Size > c.Size {
			return Report{}, &BadLeaf{Leaf: c.Size, Why: fmt.Sprintf("it is missing: a witness has seen %d leaves, and the log has %d", seen.Size, c.Size)}
		}
		v.seen[seen.Size] = seen.Root
	}
	r := Report{Heads: make(map[string]Head), Begins: make(map[string]Head)}
	notes, err := src.NodeKeys(ctx)
	if err != nil {
		return r, err
	}
	v.chains.notes = notes
	v.proved = tlog.TileHashReader(tlog.Tree{N: c.Size, Hash: c.Root}, tileReader{src})
	v.size, v.next, v.first = c.Size, first, first
	if first > 0 { // otherwise the leaves are compared one by one
		err = v.compareSeen(known.Checkpoints)
	}
	if err == nil {
		err = src.Rows(ctx, first, end, v.leaf)
	}
	if err == nil && v.next != end {
		err = &BadLeaf{Leaf: v.next, Why: fmt.Sprintf("it is missing, and so is all before leaf %d", end)}
	}
	if err == nil && first == 0 && end == c.Size && c.Size > 0 {
		if root := v.tree.Root(); root != c.Root {
			err = &BadLeaf{Leaf: 0, Why: "the tree's root is another one than its checkpoint's"}
		}
	}
	r.First, r.Leaves = first, v.next-first
	if err == nil {
		err = src.Tail(ctx, func(row Row) error { r.Tail++; return v.tail(row) })
	}
	if err == nil {
		err = v.end()
	}
	if err == nil && first == 0 && key.Origin > 1 && !v.begun {
		err = &BadLeaf{Leaf: 0, Why: fmt.Sprintf("no event of it is of the recovery that has begun it: who has called it the log of origin %d?", key.Origin)}
	}
	for node, s := range v.chains.nodes {
		r.Heads[node], r.Begins[node] = s.head, s.begins
	}
	r.Follows, r.Archived = v.follows, v.archived
	return r, err
}

// verification is one Verify under way.
type verification struct {
	key    LogKey
	chains *Chains
	src    Source
	tree   Tree
	proved tlog.HashReader
	expect map[string]Head
	seen   map[int64]tlog.Hash // roots, by size

	earlier, follows []Checkpoint // of the logs before: that are known, that this one names
	archived         []Archived   // leaves of the site's logs that it says are in bundles
	begun            bool         // the recovery that has begun it was seen

	size, first, next int64
	tile              int64 // the one whose hashes are in hashes
	hashes            []tlog.Hash
}

// compareSeen compares the tree with what witnesses have seen of it, by its tiles.
func (v *verification) compareSeen(seen []Checkpoint) error {
	for _, was := range seen {
		if err := follows(v.size, was, v.proved); err != nil {
			return err
		}
	}
	return nil
}

// Follows is nil if the tree of a log's checkpoint begins with that of one that somebody has
// seen of it. Its error is a *BadLeaf if it does not.
func Follows(now, was Checkpoint, tiles TileSource) error {
	return follows(now.Size, was, tlog.TileHashReader(tlog.Tree{N: now.Size, Hash: now.Root}, tileReader{tiles}))
}

func follows(size int64, was Checkpoint, proved tlog.HashReader) error {
	if was.Size > size {
		return &BadLeaf{Leaf: size, Why: fmt.Sprintf("it is missing: a witness has seen %d leaves, and the log has %d", was.Size, size)}
	}
	root, err := tlog.TreeHash(was.Size, proved)
	if err != nil {
		return fmt.Errorf("comparing the tree with the one of %d leaves that a witness has seen: %w", was.Size, err)
	}
	if root != was.Root {
		return &BadLeaf{Leaf: max(0, was.Size-1), Why: "this leaf or one before is another than a witness has seen: the log was forked"}
	}
	return nil
}

// Proved calls do for the leaves from first up to, and without, end, in order, of which
// each is shown to be the log's by its checkpoint: the text, and not who has written it.
// Its error is, or wraps, a *BadLeaf at one that is not.
func Proved(ctx context.Context, c Checkpoint, first, end int64, src Source, do func(Row) error) error {
	v := &verification{proved: tlog.TileHashReader(tlog.Tree{N: c.Size, Hash: c.Root}, tileReader{src}), size: c.Size, next: first}
	err := src.Rows(ctx, first, end, func(row Row) error {
		if row.Leaf != v.next {
			return &BadLeaf{Leaf: v.next, Why: "it is missing"}
		}
		if _, err := v.prove(row); err != nil {
			return err
		}
		v.next++
		return do(row)
	})
	if err == nil && v.next != end {
		err = &BadLeaf{Leaf: v.next, Why: "it is missing"}
	}
	return err
}

// prove compares a row's text with its leaf, and returns the leaf's hash. An error that
// is no *BadLeaf says that the tile of the leaf could not be read, or not be proved.
func (v *verification) prove(row Row) (tlog.Hash, error) {
	if v.hashes == nil || row.Leaf>>TileHeight != v.tile {
		if err := v.openTile(row.Leaf >> TileHeight); err != nil {
			return tlog.Hash{}, err
		}
	}
	h := tlog.RecordHash(row.Body)
	if h != v.hashes[row.Leaf&(tileWidth-1)] {
		return h, &BadLeaf{row.Leaf, row.Node, row.Seq, "its text is another one than that of its leaf"}
	}
	return h, nil
}

func (v *verification) leaf(row Row) error {
	if row.Leaf != v.next {
		return &BadLeaf{Leaf: v.next, Why: fmt.Sprintf("it is missing: leaf %d comes after %d", row.Leaf, v.next-1)}
	}
	h, err := v.prove(row)
	if _, bad := errors.AsType[*BadLeaf](err); err != nil && !bad {
		return v.narrow(row, err)
	}
	if err != nil {
		return err
	}
	if _, err := v.chains.add(row, false); err != nil {
		return err
	}
	if err := v.told(row); err != nil {
		return err
	}
	if v.first == 0 {
		v.tree.Append(h)
		v.tree.full = nil // only the root is of interest
		if root, ok := v.seen[v.tree.size]; ok && root != v.tree.Root() {
			return &BadLeaf{row.Leaf, row.Node, row.Seq, "this leaf or one before is another than a witness has seen: the log was forked"}
		}
	}
	v.next++
	return v.knownHead(row)
}

// openTile reads the hashes of a tile's leaves and proves them against the checkpoint.
func (v *verification) openTile(n int64) error {
	from := n << TileHeight
	to := min(from+tileWidth, v.size)
	indexes := make([]int64, 0, tileWidth)
	for i := from; i < to; i++ {
		indexes = append(indexes, tlog.StoredHashIndex(0, i))
	}
	hashes, err := v.proved.ReadHashes(indexes)
	if err != nil {
		return err
	}
	v.tile, v.hashes = n, hashes
	return nil
}

// narrow finds the first bad leaf in a tile that is not that of the checkpoint: each
// node has signed the head of its chain after each commit.
func (v *verification) narrow(row Row, cause error) error {
	from := row.Leaf &^ (tileWidth - 1)
	to := min(from+tileWidth, v.size)
	signed := make(map[string]Row) // by node: the first row that no signature covers yet
	err := v.src.Rows(context.Background(), v.next, to, func(r Row) error {
		if _, ok := signed[r.Node]; !ok {
			signed[r.Node] = r
		}
		ok, err := v.chains.add(r, true)
		if err != nil {
			first := signed[r.Node]
			return &BadLeaf{first.Leaf, first.Node, first.Seq, err.Error()}
		}
		if ok {
			delete(signed, r.Node)
		}
		return nil
	})
	if bad := (*BadLeaf)(nil); errors.As(err, &bad) {
		return bad
	}
	return &BadLeaf{row.Leaf, row.Node, row.Seq, fmt.Sprintf("the hashes of leaves %d to %d are not those of the checkpoint (%v)", from, to-1, cause)}
}

func (v *verification) tail(row Row) error {
	if row.Leaf >= 0 {
		return &BadLeaf{row.Leaf, row.Node, row.Seq, "it claims a leaf that the checkpoint does not have"}
	}
	if _, err := v.chains.add(row, true); err != nil {
		return err
	}
	if err := v.told(row); err != nil {
		return err
	}
	return v.knownHead(row)
}

// told takes in what the log says of itself: which logs it follows, and where leaves of
// it are that are not among those to be verified.
func (v *verification) told(row Row) error {
	if v.key.Origin == 1 && v.first == 0 {
		return nil // it follows none, and all of it is there
	}
	p, err := placeOf(row.Body)
	if err != nil {
		return err
	}
	switch p.action {
	case Recover:
		return v.follow(row)
	case AuditDropped:
		return v.archive(row)
	}
	return nil
}

// archive takes in which leaves of the log, or of one before it, are in a bundle.
func (v *verification) archive(row Row) error {
	e, err := ParseEvent(row.Body)
	if err != nil || e.Outcome != Done {
		return err
	}
	if a, err := ParseArchived(e.Reason); err == nil && VouchName(a.Log) == v.key.Site {
		v.archived = append(v.archived, a)
	}
	return nil
}

// follow takes in which logs this one says to follow, if the row is of the recovery that
// has begun it: each must have been signed by its log, and a witness have seen no more
// of it.
func (v *verification) follow(row Row) error {
	e, err := ParseEvent(row.Body)
	if err != nil || int64(e.Count) != v.key.Origin {
		return err
	}
	v.begun = true
	for _, signed := range e.Follows {
		c, err := v.key.OpenEarlier(signed)
		if err != nil {
			return &BadLeaf{row.Leaf, row.Node, row.Seq, fmt.Sprintf("what it says that the log follows is not so: %v", err)}
		}
		for _, seen := range v.earlier {
			if seen.Origin == c.Origin && (seen.Size > c.Size || seen.Size == c.Size && seen.Root != c.Root) {
				return &BadLeaf{row.Leaf, row.Node, row.Seq, fmt.Sprintf("it says that the log follows %d leaves of %s, and a witness has seen %d, or others", c.Size, c.Origin, seen.Size)}
			}
		}
		v.follows = append(v.follows, c)
	}
	return nil
}

// knownHead compares a head with what is known of it from elsewhere.
func (v *verification) knownHead(row Row) error {
	was, ok := v.expect[row.Node]
	if !ok || was.Seq != row.Seq {
		return nil
	}
	delete(v.expect, row.Node)
	if is := v.chains.nodes[row.Node].head; is != was {
		return &BadLeaf{row.Leaf, row.Node, row.Seq, "a witness has seen another event there, or before"}
	}
	return nil
}

// end finds what is missing at the ends of the chains.
func (v *verification) end() error {
	for _, node := range slices.Sorted(maps.Keys(v.chains.nodes)) {
		if s := v.chains.nodes[node]; s.tail && s.signed < s.head.Seq {
			return &BadLeaf{-1, node, s.signed + 1, "the node has not signed it"}
		}
	}
	for _, node := range slices.Sorted(maps.Keys(v.expect)) {
		was := v.expect[node]
		s := v.chains.nodes[node]
		switch {
		case s == nil && was.Seq > 0 && v.first == 0 && v.key.Origin == 1:
			return &BadLeaf{-1, node, 1, fmt.Sprintf("it is missing: a witness has seen %d events", was.Seq)}
		case s != nil && s.head.Seq < was.Seq:
			return &BadLeaf{-1, node, s.head.Seq + 1, fmt.Sprintf("it is missing: a witness has seen %d events", was.Seq)}
		}
	}
	return nil
}

// Chains verifies the chains of a site's nodes, and their signatures.
type Chains struct {
	key   LogKey
	nodes map[string]*chainState
	notes map[string]string // that vouch for keys, of nodes whose chain begins in the middle
}

type chainState struct {
	begins Head // before the first event that was added
	head   Head
	key    ed25519.PublicKey // nil: no event has named it yet
	note   string            // that vouches for it
	signed int64             // the last event that a signature of the node was verified for
	tail   bool              // an event of it had to be signed
}

// NewChains begins with nothing known of any node.
func NewChains(key LogKey) *Chains { return &Chains{key: key, nodes: make(map[string]*chainState)} }

// Load goes on with a chain where it was left: its head, and the note that vouches for
// the node's key, "" if none does yet.
func (c *Chains) Load(node string, head Head, keyNote string) {
	s := &chainState{begins: head, head: head, signed: head.Seq}
	s.vouched(c.key, node, keyNote)
	c.nodes[node] = s
}

// vouched takes the node's key from a note that vouches for it. One that the log's key has
// not signed is as none: the log has another key since its token was zeroized, or somebody
// wrote it into the database. What the node signs is then not believed before an event of
// the node names its key anew.
func (s *chainState) vouched(log LogKey, node, keyNote string) {
	if key, err := log.NodeKey(keyNote, node); err == nil {
		s.key, s.note = key, keyNote
	}
}

// Head is where the chain of a node ends.
func (c *Chains) Head(node string) Head {
	if s := c.nodes[node]; s != nil {
		return s.head
	}
	return Head{}
}

// KeyNote is the note that vouches for the node's key.
func (c *Chains) KeyNote(node string) string {
	if s := c.nodes[node]; s != nil {
		return s.note
	}
	return ""
}

// Add verifies that a row goes on its node's chain, and its signature if it has one.
// signed says that it has. Its error is a *BadLeaf.
func (c *Chains) Add(row Row) (signed bool, err error) { return c.add(row, true) }

// add does not look at signatures if they are not needed: the tree covers the row.
func (c *Chains) add(row Row, verify bool) (signed bool, err error) {
	bad := func(format string, args ...any) error {
		return &BadLeaf{row.Leaf, row.Node, row.Seq, fmt.Sprintf(format, args...)}
	}
	p, err := placeOf(row.Body)
	if err != nil {
		return false, bad("%v", err)
	}
	if p.node != row.Node || p.seq != row.Seq {
		return false, bad("its text says that it is event %d of node %s", p.seq, p.node)
	}
	s := c.nodes[row.Node]
	if s == nil {
		s = &chainState{}
		if row.Seq != 1 { // what is verified begins in the middle of the chain
			if len(row.Prev) != len(s.head.Hash) {
				return false, bad("the hash before it is missing")
			}
			s.head = Head{Seq: row.Seq - 1, Hash: [32]byte(row.Prev)}
			s.begins = s.head
			s.vouched(c.key, row.Node, c.notes[row.Node])
		}
		s.signed = s.head.Seq
		c.nodes[row.Node] = s
	}
	head, err := s.head.Next(row.Seq, row.Prev, row.Body)
	if err != nil {
		if row.Seq > s.head.Seq+1 {
			return false, &BadLeaf{-1, row.Node, s.head.Seq + 1, "it is missing"}
		}
		return false, bad("%v: that one or this one was changed", err)
	}
	s.head = head
	if p.action == Start || p.action == FactsChanged {
		if err := c.learn(s, row); err != nil {
			return false, bad("%v", err)
		}
	}
	s.tail = s.tail || verify
	if row.Sig == nil || !verify || s.key == nil {
		return false, nil
	}
	if !VerifyHead(s.key, row.Node, head, row.Sig) {
		return false, &BadLeaf{row.Leaf, row.Node, s.signed + 1, fmt.Sprintf("the node has not signed what leads to event %d", row.Seq)}
	}
	s.signed = row.Seq
	return true, nil
}

// learn takes in a key that an event names for its node.
func (c *Chains) learn(s *chainState, row Row) error {
	e, err := ParseEvent(row.Body)
	if err != nil {
		return err
	}
	if e.Facts.Key == "" {
		return nil
	}
	key, err := c.key.NodeKey(e.Facts.Key, row.Node)
	if err != nil {
		return err
	}
	s.key, s.note = bytes.Clone(key), e.Facts.Key
	return nil
}
