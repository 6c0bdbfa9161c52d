//go:build failpoint

package saedoor

import (
	"net/http"

	"github.com/qutemail/kme/internal/failpoint"
)

// writeBody writes an answer's body in two halves, and hits point in between, when
// the first has left.
func writeBody(w http.ResponseWriter, body []byte, point string) error {
	half := len(body) / 2
	if _, err := w.Write(body[:half]); err != nil {
		return err
	}
	if point != "" {
		if err := http.NewResponseController(w).Flush(); err != nil {
			return err
		}
		failpoint.Hit(point)
	}
	_, err := w.Write(body[half:])
	return err
}
