package authority

import (
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
)

// record gathers what is worth logging of one request. smallstep hands such facts
// to a ResponseWriter that has these methods (its logging.ResponseLogger).
type record struct {
	http.ResponseWriter
	status, size int
	fields       map[string]any
}

func (r *record) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

func (r *record) Write(b []byte) (int, error) {
	n, err := r.ResponseWriter.Write(b)
	r.size += n
	return n, err
}

func (r *record) StatusCode() int                  { return r.status }
func (r *record) Size() int                        { return r.size }
func (r *record) Fields() map[string]any           { return r.fields }
func (r *record) WithFields(fields map[string]any) { maps.Copy(r.fields, fields) }

// logged writes one line for each request. smallstep's own logger would print the
// whole one-time token (field "ott"). Of its fields only those named here are
// logged, with the token cut out of the error's text, and of the URL only the
// route that matched.
func logged(log *slog.Logger) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			start := time.Now()
			rec := &record{ResponseWriter: w, status: http.StatusOK, fields: make(map[string]any)}
			next.ServeHTTP(rec, r)
			attrs := []slog.Attr{
				slog.String("method", r.Method),
				slog.String("route", chi.RouteContext(r.Context()).RoutePattern()),
				slog.Int("status", rec.status),
				slog.String("took", time.Since(start).Round(time.Microsecond).String()),
				slog.String("remote", r.RemoteAddr),
			}
			for _, name := range []string{"subject", "serial", "valid-to"} {
				if v, ok := rec.fields[name]; ok {
					attrs = append(attrs, slog.Any(name, v))
				}
			}
			level := slog.LevelInfo
			if v, ok := rec.fields["error"]; ok {
				level = slog.LevelWarn
				attrs = append(attrs, slog.String("error", withoutToken(v, rec.fields["ott"])))
			}
			log.LogAttrs(r.Context(), level, "request", attrs...)
		})
	}
}

func withoutToken(err, token any) string {
	text := fmt.Sprint(err)
	if t, ok := token.(string); ok && t != "" {
		text = strings.ReplaceAll(text, t, "[token]")
	}
	return text
}
