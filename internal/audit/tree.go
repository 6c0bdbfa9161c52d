package audit

import (
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// TileHeight is the height of the log's tiles: 256 hashes, as C2SP tlog-tiles has them.
const TileHeight = 8

const tileWidth = 1 << TileHeight

// Tree is the right edge of a Merkle tree (RFC 6962, 2.1), to which leaves are added.
// What it needs to go on is its partial tiles. The zero Tree is empty.
type Tree struct {
	size   int64
	levels []treeLevel
	full   []Tile // complete since the last call of Tiles
}

// treeLevel is the partial tile of a level, and the roots of the perfect subtrees in
// it, the largest first.
type treeLevel struct {
	n      int64 // of the tile within its level
	hashes []tlog.Hash
	edge   []tlog.Hash
	fresh  bool // it has changed since the last call of Tiles
}

// Tile is a tile of the tree and its content: Width hashes one after the other.
type Tile struct {
	Level int
	N     int64
	Data  []byte
}

// Width is how many hashes the tile has, at most 256.
func (t Tile) Width() int { return len(t.Data) / tlog.HashSize }

// LoadTree goes on with a tree of size leaves. read returns the content of a partial
// tile, or more of it.
func LoadTree(size int64, read func(level int, n int64) ([]byte, error)) (*Tree, error) {
	t := &Tree{size: size}
	for level, count := 0, size; count > 0; level, count = level+1, count>>TileHeight {
		l := treeLevel{n: count >> TileHeight}
		t.levels = append(t.levels, l)
		width := int(count & (tileWidth - 1))
		if width == 0 {
			continue
		}
		data, err := read(level, l.n)
		if err != nil {
			return nil, fmt.Errorf("reading tile %d of level %d: %w", l.n, level, err)
		}
		if len(data) < width*tlog.HashSize {
			return nil, fmt.Errorf("tile %d of level %d has %d bytes, and a tree of %d leaves needs %d hashes there", l.n, level, len(data), size, width)
		}
		for i := range width {
			t.levels[level].add(tlog.Hash(data[i*tlog.HashSize:]))
		}
		t.levels[level].fresh = false
	}
	return t, nil
}

func (l *treeLevel) add(h tlog.Hash) {
	l.hashes, l.fresh = append(l.hashes, h), true
	for n := len(l.hashes); n&1 == 0; n >>= 1 {
		h = tlog.NodeHash(l.edge[len(l.edge)-1], h)
		l.edge = l.edge[:len(l.edge)-1]
	}
	l.edge = append(l.edge, h)
}

// Size is how many leaves the tree has.
func (t *Tree) Size() int64 { return t.size }

// Append adds a leaf by its hash (tlog.RecordHash).
func (t *Tree) Append(leaf tlog.Hash) {
	t.size++
	h := leaf
	for level := 0; ; level++ {
		if level == len(t.levels) {
			t.levels = append(t.levels, treeLevel{})
		}
		l := &t.levels[level]
		l.add(h)
		if len(l.hashes) < tileWidth {
			return
		}
		h = l.edge[0]
		t.full = append(t.full, l.tile(level))
		*l = treeLevel{n: l.n + 1, hashes: l.hashes[:0], edge: l.edge[:0]}
	}
}

func (l *treeLevel) tile(level int) Tile {
	data := make([]byte, 0, len(l.hashes)*tlog.HashSize)
	for _, h := range l.hashes {
		data = append(data, h[:]...)
	}
	return Tile{Level: level, N: l.n, Data: data}
}

// Root is the tree's hash.
func (t *Tree) Root() tlog.Hash {
	var root tlog.Hash
	none := true
	for _, l := range t.levels { // from the right, which is the smallest subtree, to the left
		for i := len(l.edge) - 1; i >= 0; i-- {
			if none {
				root, none = l.edge[i], false
			} else {
				root = tlog.NodeHash(l.edge[i], root)
			}
		}
	}
	if none {
		return emptyRoot
	}
	return root
}

// emptyRoot is SHA-256 of nothing (RFC 6962, 2.1).
var emptyRoot = func() tlog.Hash {
	h, err := tlog.TreeHash(0, nil)
	if err != nil {
		panic(err) // it reads nothing
	}
	return h
}()

// Tiles returns the tiles that have changed since it was called last.
func (t *Tree) Tiles() []Tile {
	tiles := t.full
	t.full = nil
	for level := range t.levels {
		if l := &t.levels[level]; l.fresh && len(l.hashes) > 0 {
			tiles = append(tiles, l.tile(level))
			l.fresh = false
		}
	}
	return tiles
}

// TileSource reads tiles. What it returns is proved against the root of a checkpoint
// before it is used.
type TileSource interface {
	// Tile returns the first width hashes of a tile.
	Tile(level int, n int64, width int) ([]byte, error)
}

// tileReader is a TileSource for package tlog.
type tileReader struct{ TileSource }

func (tileReader) Height() int { return TileHeight }

func (r tileReader) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	data := make([][]byte, len(tiles))
	for i, t := range tiles {
		var err error
		if data[i], err = r.Tile(t.L, t.N, t.W); err != nil {
			return nil, err
		}
		if len(data[i]) != t.W*tlog.HashSize {
			return nil, fmt.Errorf("tile %d of level %d is %d bytes long, not %d", t.N, t.L, len(data[i]), t.W*tlog.HashSize)
		}
	}
	return data, nil
}

func (tileReader) SaveTiles([]tlog.Tile, [][]byte) {}

// ProveLeaf proves that the tree of a checkpoint has its leaf number index.
func ProveLeaf(c Checkpoint, index int64, tiles TileSource) (tlog.RecordProof, error) {
	if index < 0 || index >= c.Size {
		return nil, fmt.Errorf("proving leaf %d: the checkpoint has %d", index, c.Size)
	}
	proof, err := tlog.ProveRecord(c.Size, index, tlog.TileHashReader(tlog.Tree{N: c.Size, Hash: c.Root}, tileReader{tiles}))
	if err != nil {
		return nil, fmt.Errorf("proving leaf %d of %d: %w", index, c.Size, err)
	}
	return proof, nil
}

// ProveGrowth proves that the tree of a checkpoint begins with the one of old leaves.
func ProveGrowth(c Checkpoint, old int64, tiles TileSource) (tlog.TreeProof, error) {
	if old < 0 || old > c.Size {
		return nil, fmt.Errorf("proving that a tree of %d leaves has grown from %d", c.Size, old)
	}
	if old == 0 || old == c.Size {
		return nil, nil
	}
	proof, err := tlog.ProveTree(c.Size, old, tlog.TileHashReader(tlog.Tree{N: c.Size, Hash: c.Root}, tileReader{tiles}))
	if err != nil {
		return nil, fmt.Errorf("proving that a tree of %d leaves has grown from %d: %w", c.Size, old, err)
	}
	return proof, nil
}

// CheckGrowth says whether a proof shows that the tree of now begins with that of was.
func CheckGrowth(was, now Checkpoint, proof tlog.TreeProof) error {
	switch {
	case was.Size > now.Size:
		return fmt.Errorf("it has %d leaves, and had %d", now.Size, was.Size)
	case was.Size == now.Size && was.Root != now.Root:
		return fmt.Errorf("it has another tree of %d leaves", now.Size)
	case was.Size == now.Size || was.Size == 0:
		if len(proof) != 0 {
			return fmt.Errorf("a proof of %d hashes where none is needed", len(proof))
		}
		return nil
	}
	if err := tlog.CheckTree(proof, now.Size, now.Root, was.Size, was.Root); err != nil {
		return fmt.Errorf("its tree of %d leaves does not begin with the one of %d: %w", now.Size, was.Size, err)
	}
	return nil
}
