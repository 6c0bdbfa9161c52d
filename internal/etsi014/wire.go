package etsi014

import (
	"encoding/base64"
	"errors"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/qutemail/kme/internal/problem"
)

// errorObject is an Error on the wire (clause 6.5). Details stay out of plain
// refusals: a client in the field takes them for strings.
type errorObject struct {
	Message string              `json:"message"`
	Details []map[string]string `json:"details,omitempty"`
	// Status and Error say it to clients of the QuteMail API, where a path is of neither.
	Status string `json:"status,omitempty"`
	Error  string `json:"error,omitempty"`
}

// unsupported are the names of members of extension_mandatory that nobody here
// knows. They are the one thing of a request that an answer repeats.
type unsupported []string

// maxDetails and maxDetailName bound what an answer repeats of a request.
const (
	maxDetails    = 8
	maxDetailName = 64
)

// Error is the operator's view.
func (u unsupported) Error() string { return "unsupported: " + strings.Join(u.short(), ", ") }

func (u unsupported) short() []string {
	var names []string
	for _, name := range u[:min(len(u), maxDetails)] {
		if len(name) > maxDetailName {
			name = strings.ToValidUTF8(name[:maxDetailName], "") + "..."
		}
		names = append(names, name)
	}
	return names
}

// answers is this door's table from a kind of problem to the wire (clause 5,
// Tables 4, 6 and 8): 200, 400, 401 and 503 are all that the standard knows.
var answers = [...]struct {
	status  int
	message string
	detail  bool // whether the problem's own sentence is told instead
}{
	problem.Internal:     {503, "error on server side", false},
	problem.Invalid:      {400, "bad request format", true},
	problem.Unauthorized: {401, "unauthorized", false},
	problem.Forbidden:    {401, "unauthorized", false},
	problem.NotFound:     {400, msgNotFound, false},
	problem.Gone:         {400, msgNotFound, false},
	problem.TooLarge:     {413, "the body is larger than 64 KiB", false},
	problem.Unavailable:  {503, "not available at the moment", true},
}

// defaultRetry is the Retry-After of a 503 whose problem does not name one.
const defaultRetry = 2 * time.Second

// wireError turns an error into status and Error object. after is not 0 with a 503.
func wireError(err error, rid string) (status int, o errorObject, after time.Duration) {
	p, ok := errors.AsType[*problem.Error](err)
	if !ok {
		p = problem.Because(problem.Internal, err)
	}
	a := answers[p.Kind]
	o.Message = a.message
	if a.detail && p.Detail != "" {
		o.Message = p.Detail
	}
	if p.Kind == problem.Internal {
		o.Message += ", request " + rid // all that finds the cause in the log
	}
	if names, ok := errors.AsType[unsupported](err); ok {
		for _, name := range names.short() {
			o.Details = append(o.Details, map[string]string{"extension_mandatory_unsupported": name + " is not supported"})
		}
	}
	if a.status == 503 {
		after = defaultRetry
		if p.RetryAfter > 0 {
			after = p.RetryAfter
		}
	}
	return a.status, o, after
}

// provenanceName is our member of key_extension; vendors' names have a prefix that
// ends in an underscore (clause 6.2).
const provenanceName = "qkm_provenance"

// ttlName is our member of extension_mandatory and extension_optional: for how many
// seconds the slaves may take the keys.
const ttlName = "qkm_ttl_s"

// appendContainer appends the Key container object (clause 6.3) of c. Key bytes go
// straight into dst: give it the capacity of containerSize, or its growth leaves
// copies behind that nobody wipes.
func appendContainer(dst []byte, c Container) []byte {
	dst = append(dst, `{"keys":[`...)
	for i, k := range c.Keys {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, `{"key_ID":"`...)
		dst, _ = k.ID.AppendText(dst) // never fails
		dst = append(dst, `","key":"`...)
		dst = base64.StdEncoding.AppendEncode(dst, k.Material.Reveal())
		dst = append(dst, '"')
		if k.Provenance != "" {
			dst = append(dst, `,"key_extension":{"`+provenanceName+`":`...)
			dst, _ = jsontext.AppendQuote(dst, string(k.Provenance)) // one of our words: valid UTF-8
			dst = append(dst, '}')
		}
		dst = append(dst, '}')
	}
	return append(dst, `]}`...)
}

// containerSize is a number of bytes that appendContainer does not exceed.
func containerSize(c Container) int {
	const around = len(`{"keys":[]}`)
	const each = len(`{"key_ID":"","key":"","key_extension":{"`+provenanceName+`":""}},`) + 36
	n := around
	for _, k := range c.Keys {
		n += each + base64.StdEncoding.EncodedLen(len(k.Material.Reveal())) + 6*len(k.Provenance)
	}
	return n
}

// marshalError returns the bytes of o. There is nothing in it that cannot be marshalled.
func marshalError(o errorObject) []byte {
	b, _ := json.Marshal(o, jsontext.AllowInvalidUTF8(true))
	return b
}
