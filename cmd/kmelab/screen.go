package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// screen prints rows that stay and, on a terminal, one last line that changes.
type screen struct {
	out  io.Writer
	live bool
}

func newScreen(out io.Writer) *screen {
	f, ok := out.(*os.File)
	return &screen{out: out, live: ok && term.IsTerminal(int(f.Fd()))}
}

// row prints a line that stays.
func (s *screen) row(name, format string, args ...any) {
	s.clear()
	fmt.Fprintf(s.out, "%-10s %s\n", name, fmt.Sprintf(format, args...))
}

// step replaces the last line; on anything but a terminal it prints nothing.
func (s *screen) step(text string) {
	if s.live {
		fmt.Fprintf(s.out, "\r\033[K%s", text)
	}
}

func (s *screen) clear() { s.step("") }

// bar is a bar of ten characters.
func bar(done float64) string {
	n := min(10, max(0, int(10*done)))
	return strings.Repeat("#", n) + strings.Repeat(".", 10-n) + fmt.Sprintf(" %.0f %%", 100*done)
}
