//go:build !failpoint

package saedoor

import "net/http"

// writeBody writes an answer's body. Half-way through it a test may kill the
// process, in a binary built for that.
func writeBody(w http.ResponseWriter, body []byte, _ string) error {
	_, err := w.Write(body)
	return err
}
