package audit

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"golang.org/x/mod/sumdb/tlog"
)

// A bundle is a part of a log in one tar file, which a stranger can verify with public
// keys alone:
//
//	key         the log's verifier key; what counts is the one that the stranger was given
//	checkpoint  signed by the log, with the witnesses' signatures
//	cosigned    an earlier checkpoint, if that one is so new that they have not signed it yet
//	nodes       the notes that vouch for the nodes' keys, by node, as JSON
//	tile/L/N    what proves the events to be in the checkpoint's tree (C2SP tlog-tiles)
//	events/N    lines of events from leaf N on (Row.AppendText)
//	tail/N      the same of events that are not in the tree, if they were asked for
const (
	bundleKey        = "key"
	bundleCheckpoint = "checkpoint"
	bundleCosigned   = "cosigned"
	bundleNodes      = "nodes"
	bundleTiles      = "tile/"
	bundleEvents     = "events/"
	bundleTail       = "tail/"
)

const (
	bundlePage = 4096    // events in one file
	maxMember  = 1 << 28 // bytes of one file that a reader takes
	maxTiles   = 1 << 24 // tiles that a reader takes
)

// BundleSpec says what of a log goes into a bundle.
type BundleSpec struct {
	Key        string // the log's verifier key
	Signed     []byte // the checkpoint, with its signatures
	Checkpoint Checkpoint
	Cosigned   []byte // an earlier one that more witnesses have signed; nil if there is none
	First, End int64  // leaves
	Tail       bool   // and what is not in the tree
	At         time.Time
}

// WriteBundle writes a bundle. It does not verify what it writes; whoever reads it does.
func WriteBundle(ctx context.Context, w io.Writer, s BundleSpec, src Source) error {
	if s.First < 0 || s.First > s.End || s.End > s.Checkpoint.Size {
		return fmt.Errorf("writing a bundle: leaves %d to %d of %d", s.First, s.End, s.Checkpoint.Size)
	}
	t := tar.NewWriter(w)
	put := func(name string, content []byte) error {
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: s.At.Truncate(time.Second), Format: tar.FormatUSTAR}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		_, err := t.Write(content)
		return err
	}
	err := errors.Join(put(bundleKey, []byte(s.Key+"\n")), put(bundleCheckpoint, s.Signed))
	if s.Cosigned != nil {
		err = errors.Join(err, put(bundleCosigned, s.Cosigned))
	}
	if err == nil {
		err = putNodes(ctx, put, src)
	}
	for _, tile := range bundleTilesOf(s) {
		if err != nil {
			break
		}
		var data []byte
		if data, err = src.Tile(tile.L, tile.N, tile.W); err == nil {
			err = put(tilePath(tile), data)
		}
	}
	if err == nil {
		err = putRows(put, bundleEvents, s.First, func(do func(Row) error) error { return src.Rows(ctx, s.First, s.End, do) })
	}
	if err == nil && s.Tail {
		err = putRows(put, bundleTail, 0, func(do func(Row) error) error { return src.Tail(ctx, do) })
	}
	if err = errors.Join(err, t.Close()); err != nil {
		return fmt.Errorf("writing a bundle: %w", err)
	}
	return nil
}

// putNodes writes the notes that vouch for the nodes' keys.
func putNodes(ctx context.Context, put func(string, []byte) error, src Source) error {
	notes, err := src.NodeKeys(ctx)
	if err != nil || len(notes) == 0 {
		return err
	}
	text, err := json.Marshal(notes, json.Deterministic(true))
	if err != nil {
		return err
	}
	return put(bundleNodes, text)
}

// putRows writes rows in files of bundlePage lines, numbered from first.
func putRows(put func(string, []byte) error, folder string, first int64, rows func(func(Row) error) error) error {
	var text []byte
	n := int64(0)
	flush := func() error {
		if n == 0 {
			return nil
		}
		err := put(fmt.Sprintf("%s%012d", folder, first), text)
		first, n, text = first+n, 0, text[:0]
		return err
	}
	err := rows(func(r Row) error {
		text = r.AppendText(text)
		if n++; n == bundlePage {
			return flush()
		}
		return nil
	})
	return errors.Join(err, flush())
}

// bundleTilesOf lists the tiles that prove the leaves: those of level 0 that hold them,
// and all that are above, or on the right edge.
func bundleTilesOf(s BundleSpec) []tlog.Tile {
	var tiles []tlog.Tile
	for level, count := 0, s.Checkpoint.Size; count > 0; level, count = level+1, count>>TileHeight {
		last := (count - 1) >> TileHeight
		for n := int64(0); n <= last; n++ {
			from, to := n<<(TileHeight*(level+1)), (n+1)<<(TileHeight*(level+1))
			if level == 0 && n != last && (to <= s.First || from >= s.End) {
				continue
			}
			tiles = append(tiles, tlog.Tile{H: TileHeight, L: level, N: n, W: int(min(count-n<<TileHeight, tileWidth))})
		}
	}
	return tiles
}

// tilePath is a tile's name as C2SP has it: tlog.Tile.Path without the height.
func tilePath(t tlog.Tile) string {
	return bundleTiles + strings.TrimPrefix(t.Path(), fmt.Sprintf("tile/%d/", TileHeight))
}

// Bundle is a bundle that was opened. It is a Source.
type Bundle struct {
	Key      string // as the bundle says
	Signed   []byte // the checkpoint
	Cosigned []byte // an earlier one; nil if there is none
	First    int64  // the first leaf
	Leaves   int64  // how many follow it, as far as the bundle claims

	f      io.ReadSeeker
	nodes  map[string]string
	tiles  map[tlog.Tile][]byte
	events []member
	tails  []member
}

// member is a file of rows and where it lies in the tar.
type member struct {
	first  int64
	offset int64
	size   int64
}

// OpenBundle reads all of a bundle but the events. f is read again whenever they are.
func OpenBundle(f io.ReadSeeker) (*Bundle, error) {
	b := &Bundle{f: f, tiles: make(map[tlog.Tile][]byte), First: -1}
	t := tar.NewReader(f)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = b.member(h, t)
		}
		if err != nil {
			return nil, fmt.Errorf("opening a bundle: %w", err)
		}
	}
	if b.Signed == nil {
		return nil, errors.New("opening a bundle: it has no checkpoint")
	}
	if err := b.count(); err != nil {
		return nil, fmt.Errorf("opening a bundle: %w", err)
	}
	return b, nil
}

func (b *Bundle) member(h *tar.Header, content io.Reader) error {
	if h.Typeflag != tar.TypeReg || h.Size > maxMember || path.Clean(h.Name) != h.Name {
		return fmt.Errorf("%.80q does not belong into one", h.Name)
	}
	read := func(limit int64) ([]byte, error) {
		if h.Size > limit {
			return nil, fmt.Errorf("%s is %d bytes long", h.Name, h.Size)
		}
		return io.ReadAll(content)
	}
	folder, name, _ := strings.Cut(h.Name, "/")
	switch {
	case h.Name == bundleKey:
		text, err := read(1024)
		b.Key = strings.TrimSuffix(string(text), "\n")
		return err
	case h.Name == bundleCheckpoint:
		var err error
		b.Signed, err = read(64 << 10)
		return err
	case h.Name == bundleCosigned:
		var err error
		b.Cosigned, err = read(64 << 10)
		return err
	case h.Name == bundleNodes:
		text, err := read(1 << 20)
		if err == nil {
			err = json.Unmarshal(text, &b.nodes)
		}
		return err
	case folder+"/" == bundleTiles:
		tile, err := tlog.ParseTilePath(fmt.Sprintf("tile/%d/%s", TileHeight, name))
		if err != nil || len(b.tiles) == maxTiles {
			return fmt.Errorf("tile %.80q: %w", h.Name, err)
		}
		data, err := read(tileWidth * tlog.HashSize)
		if err != nil || len(data) != tile.W*tlog.HashSize {
			return fmt.Errorf("tile %s is %d bytes long: %w", h.Name, len(data), err)
		}
		b.tiles[tile] = data
		return nil
	case folder+"/" == bundleEvents, folder+"/" == bundleTail:
		m := member{size: h.Size}
		if _, err := fmt.Sscanf(name, "%d", &m.first); err != nil || fmt.Sprintf("%012d", m.first) != name {
			return fmt.Errorf("%.80q is no file of events", h.Name)
		}
		var err error
		if m.offset, err = b.f.Seek(0, io.SeekCurrent); err != nil {
			return err
		}
		if folder+"/" == bundleTail {
			b.tails = append(b.tails, m)
			return nil
		}
		b.events = append(b.events, m)
		return nil
	}
	return fmt.Errorf("%.80q does not belong into one", h.Name)
}

// count finds out which leaves the bundle has, from its last file.
func (b *Bundle) count() error {
	slices.SortFunc(b.events, func(x, y member) int { return int(min(1, max(-1, x.first-y.first))) })
	slices.SortFunc(b.tails, func(x, y member) int { return int(min(1, max(-1, x.first-y.first))) })
	if len(b.events) == 0 {
		b.First = 0
		return nil
	}
	b.First = b.events[0].first
	last := b.events[len(b.events)-1]
	end := last.first
	err := b.lines(last, func(r Row) error { end = r.Leaf + 1; return nil })
	b.Leaves = end - b.First
	return err
}

// Tile implements TileSource.
func (b *Bundle) Tile(level int, n int64, width int) ([]byte, error) {
	for _, w := range []int{width, tileWidth} {
		if data, ok := b.tiles[tlog.Tile{H: TileHeight, L: level, N: n, W: w}]; ok {
			return data[:width*tlog.HashSize], nil
		}
	}
	return nil, fmt.Errorf("the bundle has no tile %d of level %d with %d hashes", n, level, width)
}

// Rows implements Source.
func (b *Bundle) Rows(_ context.Context, first, end int64, do func(Row) error) error {
	for i, m := range b.events {
		if m.first >= end || i+1 < len(b.events) && b.events[i+1].first <= first {
			continue
		}
		err := b.lines(m, func(r Row) error {
			if r.Leaf < first || r.Leaf >= end {
				return nil
			}
			return do(r)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// NodeKeys implements Source.
func (b *Bundle) NodeKeys(context.Context) (map[string]string, error) { return b.nodes, nil }

// Tail implements Source.
func (b *Bundle) Tail(_ context.Context, do func(Row) error) error {
	for _, m := range b.tails {
		if err := b.lines(m, do); err != nil {
			return err
		}
	}
	return nil
}

func (b *Bundle) lines(m member, do func(Row) error) error {
	if _, err := b.f.Seek(m.offset, io.SeekStart); err != nil {
		return err
	}
	r := bufio.NewReader(io.LimitReader(b.f, m.size))
	for {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) && len(line) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the events of a bundle: %w", err)
		}
		row, err := ParseRow(bytes.TrimSuffix(line, []byte{'\n'}))
		if err != nil {
			return err
		}
		if err := do(row); err != nil {
			return err
		}
	}
}

// VerifyBundle verifies all of a bundle: that the log has signed its checkpoint, and
// everything that Verify does. cosigned are those of the witnesses that have signed it
// too, or an earlier checkpoint of which the report says the leaves. A bundle that must be
// of the whole log may not end before its checkpoint does, and what is before its first
// leaf must be in bundles that the log itself names: whoever has the database can say so
// of any leaf, and cannot sign it.
func VerifyBundle(ctx context.Context, key LogKey, witnesses []Witness, known Known, whole bool, b *Bundle) (r Report, c Checkpoint, cosigned []string, err error) {
	if c, cosigned, err = OpenCheckpoint(b.Signed, key, witnesses...); err != nil {
		return r, c, nil, err
	}
	first, end := b.First, b.First+b.Leaves
	if whole {
		end = c.Size
		if b.Leaves == 0 {
			first = c.Size // all of it is in other bundles, or nowhere
		}
	}
	if end > c.Size {
		return r, c, cosigned, &BadLeaf{Leaf: c.Size, Why: "the checkpoint does not have it"}
	}
	r, err = verify(ctx, key, c, first, end, known, b)
	if err == nil && whole && first > 0 {
		err = named(first-1, key, slices.Concat(r.Archived, known.Archived))
	}
	r.Cosigned = c.Size
	if err == nil && len(cosigned) < len(witnesses) && b.Cosigned != nil {
		cosigned, r.Cosigned, err = b.cosigned(key, c, cosigned, witnesses)
	}
	return r, c, cosigned, err
}

// named is nil if one of the bundles that were named has a leaf of the log.
func named(leaf int64, key LogKey, bundles []Archived) error {
	has := func(a Archived) bool { return a.Log == key.Name() && a.First <= leaf && leaf <= a.Last }
	if slices.ContainsFunc(bundles, has) {
		return nil
	}
	return &BadLeaf{Leaf: leaf, Why: "it is missing, and no event of the log says that it went into a bundle"}
}

// cosigned are the witnesses that have signed the bundle's earlier checkpoint, and its
// leaves, if they are more than those of c. The tree of c must begin with its tree.
func (b *Bundle) cosigned(key LogKey, c Checkpoint, names []string, witnesses []Witness) ([]string, int64, error) {
	earlier, more, err := OpenCheckpoint(b.Cosigned, key, witnesses...)
	if err != nil || len(more) <= len(names) {
		return names, c.Size, err
	}
	if err := Follows(c, earlier, b); err != nil {
		return names, c.Size, err
	}
	return more, earlier.Size, nil
}

// OpenBundleFile opens the bundle in a file, which the caller closes.
func OpenBundleFile(name string) (*Bundle, *os.File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, nil, fmt.Errorf("opening a bundle: %w", err)
	}
	b, err := OpenBundle(f)
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return b, f, nil
}

// Prove proves that the log has a leaf that the bundle has, by the bundle's checkpoint.
func (b *Bundle) Prove(leaf int64, key LogKey) (p Proof, err error) {
	c, _, err := OpenCheckpoint(b.Signed, key)
	if err != nil {
		return p, err
	}
	p = Proof{Leaf: leaf, Checkpoint: string(b.Signed)}
	if p.Proof, err = ProveLeaf(c, leaf, b); err != nil {
		return p, err
	}
	err = b.Rows(context.Background(), leaf, leaf+1, func(r Row) error { p.Text = string(r.Body); return nil })
	if err == nil && p.Text == "" {
		err = fmt.Errorf("the bundle does not have leaf %d", leaf)
	}
	return p, err
}
