package handover

import "fmt"

// Figures say how far a site has come, by the log of each of its nodes. While the
// origin stays the same they only grow: a site whose figures are below what was
// once known of them has been restored to the past, and has forgotten what it
// delivered since. A recovery from that raises the origin, and the account begins
// anew. Origin 0 says that the figures are not known.
type Figures struct {
	Origin int64         `json:"origin"`
	Nodes  []NodeFigures `json:"nodes,omitempty"`
}

// NodeFigures are those of one node.
type NodeFigures struct {
	Node string `json:"node"`
	Run  int64  `json:"run"`
	Seq  int64  `json:"seq"`  // of the last event of its log
	Head Digest `json:"head"` // the hash that ends the log there
}

// Behind says how f, read now, falls short of what was known of the same site
// before; "" if it does not. known must have been committed when f was read:
// figures that crossed on the way prove nothing.
func (f Figures) Behind(known Figures) string {
	switch {
	case f.Origin == 0 || known.Origin < f.Origin:
		return ""
	case known.Origin > f.Origin:
		return fmt.Sprintf("its log is that of origin %d, and was that of origin %d", f.Origin, known.Origin)
	}
	now := make(map[string]NodeFigures, len(f.Nodes))
	for _, n := range f.Nodes {
		now[n.Node] = n
	}
	for _, was := range known.Nodes {
		switch is := now[was.Node]; {
		case is.Run < was.Run:
			return fmt.Sprintf("node %s is in run %d, and was in run %d", was.Node, is.Run, was.Run)
		case is.Seq < was.Seq:
			return fmt.Sprintf("the log of node %s has %d events, and had %d (head %.4x)", was.Node, is.Seq, was.Seq, was.Head[:])
		case is.Seq == was.Seq && is.Head != was.Head:
			return fmt.Sprintf("the log of node %s ends in another event %d (head %.4x, not %.4x)", was.Node, is.Seq, is.Head[:], was.Head[:])
		}
	}
	return ""
}
