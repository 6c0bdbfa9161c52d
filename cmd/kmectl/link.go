package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"

	"golang.org/x/term"

	"github.com/qutemail/kme/internal/admin"
	"github.com/qutemail/kme/internal/key"
)

type linkCommand struct {
	Watch bool          `help:"Go on showing it, until Ctrl-C."`
	Trust string        `placeholder:"LINK" help:"Let a link go on that rests because tags of the other end were wrong (security officers)."`
	Every time.Duration `default:"500ms" help:"With --watch: how often to ask (${default})."`
}

// Run prints how the links stand, once or until ctx ends.
func (c linkCommand) Run(ctx context.Context, s *session) error {
	p, client, err := s.operator()
	if err != nil {
		return err
	}
	if c.Trust != "" {
		if err := client.TrustLink(ctx, c.Trust); err != nil {
			return p.explain(err, p.unlisted())
		}
	}
	links, err := client.Links(ctx)
	if err != nil {
		return p.explain(err, p.unlisted())
	}
	show := s.watcher()
	if !c.Watch {
		show = func(links []admin.Link) error { return s.printLinks(links) }
	}
	if err := show(links); err != nil || !c.Watch {
		return err
	}
	tick := time.NewTicker(max(c.Every, 10*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		links, err := client.Links(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil: // the KME may be starting again: go on asking
			links = []admin.Link{{ID: p.kme, State: admin.LinkDown, Why: err.Error()}}
		}
		if err := show(links); err != nil {
			return err
		}
	}
}

func (s *session) printLinks(links []admin.Link) error {
	if s.JSON {
		return s.printJSON(struct {
			Links []admin.Link `json:"links"`
		}{links})
	}
	_, err := io.WriteString(s.stdout, strings.Join(describe(links), "\n")+"\n")
	return err
}

// watcher returns what shows the links again and again: in place on a terminal,
// else a line for each block and each change of state.
func (s *session) watcher() func([]admin.Link) error {
	file, ok := s.stdout.(*os.File)
	switch {
	case s.JSON:
		return s.printLinks
	case ok && term.IsTerminal(int(file.Fd())):
		screen := &screen{w: file, width: func() int {
			width, _, err := term.GetSize(int(file.Fd()))
			if err != nil {
				return 80
			}
			return width
		}}
		return func(links []admin.Link) error { return screen.show(describe(links)) }
	}
	j := &journal{w: s.stdout, seen: make(map[string]string)}
	return j.show
}

// describe draws the links, a few lines each.
func describe(links []admin.Link) []string {
	if len(links) == 0 {
		return []string{"no links"}
	}
	var lines []string
	for _, l := range links {
		lines = append(lines, heading(l))
		lines = append(lines, fmt.Sprintf("  stored  %d keys to assign here, %d at %s", l.Stored, l.StoredPeer, l.Peer))
		lines = append(lines, "  last    "+lastBlock(l))
		if l.Last != nil {
			lines = append(lines, figures(*l.Last)...)
		}
		if l.EpsLimit > 0 {
			lines = append(lines, fmt.Sprintf("  reserve %d pads · risked this year %.1g of %.1g", l.Pads, l.EpsSecrecy+l.EpsCorrect, l.EpsLimit))
		}
		lines = append(lines, "  now     "+progress(l.Current))
	}
	return lines
}

func heading(l admin.Link) string {
	s := fmt.Sprintf("%s  %s", l.ID, l.State)
	if l.Why != "" {
		s += " (" + printable(l.Why) + ")"
	}
	if l.Peer != "" {
		s += fmt.Sprintf("  %s's end, %s at the other, session %d, %s, %d blocks, %d given up", l.End, l.Peer, l.Session, l.Provenance, l.Blocks, l.Aborts)
	}
	return s
}

func lastBlock(l admin.Link) string {
	b := l.Last
	if b == nil {
		return "-"
	}
	s := fmt.Sprintf("block %d at %s: ", b.Block, clock(b.At))
	if b.Aborted != "" && b.QBER == 0 { // before it was known
		return s + "GIVEN UP: " + printable(b.Aborted)
	}
	s += fmt.Sprintf("QBER %.2f %%", 100*b.QBER)
	if b.Aborted != "" {
		return s + ", GIVEN UP: " + printable(b.Aborted)
	}
	if b.Efficiency > 0 {
		s += fmt.Sprintf(", f %.3f", b.Efficiency)
	}
	s += fmt.Sprintf(", %d bits (%d keys)", b.Length, b.Length/key.AtomBits)
	if b.Gates > 0 {
		s += fmt.Sprintf(" from %d pulses", b.Gates)
	}
	return s + fmt.Sprintf(" in %.1f s", b.Took)
}

// figures are what the last block showed, beyond its line.
func figures(b admin.Block) []string {
	if b.Gates == 0 || b.Detected == 0 {
		return nil
	}
	gains := make([]string, len(b.Gains))
	for i, g := range b.Gains {
		gains[i] = fmt.Sprintf("%.2e", g)
	}
	light := fmt.Sprintf("  light   %d detected", b.Detected)
	if b.Doubles > 0 {
		light += fmt.Sprintf(", %d double", b.Doubles)
	}
	if len(gains) > 0 {
		light += ", gains " + strings.Join(gains, " ") + " (signal, decoys)"
	}
	sifted := fmt.Sprintf("  sifted  %d key and %d test bits", b.SiftedKey, b.SiftedTest)
	if b.Leak > 0 {
		sifted += fmt.Sprintf(", QBER of the key %.2f %%, leak %d of at most %d bits in %d rounds", 100*b.KeyQBER, b.Leak, b.LeakLimit, b.Rounds)
	}
	return []string{light, sifted}
}

// printable is s on one line, and without what a terminal would obey: some of it
// was said by another site.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}

// barWidth is the length of a progress bar, in characters.
const barWidth = 24

func progress(p *admin.Progress) string {
	if p == nil {
		return "-"
	}
	done := p.Block()
	full := int(done * barWidth)
	return fmt.Sprintf("%s%s %3.0f %%  %s", strings.Repeat("#", full), strings.Repeat(".", barWidth-full), 100*done, p.Stage)
}

// screen draws lines on a terminal, over those drawn before.
type screen struct {
	w     io.Writer
	width func() int // of the terminal, in characters
	lines int        // drawn before
}

func (s *screen) show(lines []string) error {
	var b strings.Builder
	if s.lines > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", s.lines) // up
	}
	width := s.width()
	for _, line := range lines {
		if r := []rune(line); len(r) > width && width > 0 { // a line that wraps would spoil the count
			line = string(r[:width])
		}
		b.WriteString(line + "\x1b[K\n") // erase what stood behind it
	}
	b.WriteString("\x1b[J") // and below
	s.lines = len(lines)
	_, err := io.WriteString(s.w, b.String())
	return err
}

// journal writes a line whenever something has happened on a link.
type journal struct {
	w    io.Writer
	seen map[string]string // what was written last, by link
}

func (j *journal) show(links []admin.Link) error {
	for _, l := range links {
		line := fmt.Sprintf("%s %s", l.ID, l.State)
		if l.Why != "" {
			line += " (" + printable(l.Why) + ")"
		}
		if l.Last != nil {
			line += ", " + lastBlock(l)
		}
		if j.seen[l.ID] == line {
			continue
		}
		j.seen[l.ID] = line
		if _, err := fmt.Fprintln(j.w, line); err != nil {
			return err
		}
	}
	return nil
}
