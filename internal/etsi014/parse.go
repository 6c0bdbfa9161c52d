package etsi014

import (
	"bytes"
	"errors"
	"fmt"
	"mime"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
	"github.com/qutemail/kme/internal/problem"
)

// The messages that the standard fixes. Clients compare them letter by letter.
const (
	msgMultipleOf8 = "size shall be a multiple of 8"
	msgMandatory   = "not all extension_mandatory parameters are supported"
	msgUnmet       = "not all extension_mandatory request options could be met"
	msgNotFound    = "one or more keys specified are not found on KME"
)

// Everything in this file is a pure function of what came in. Each error is a
// *problem.Error of kind Invalid whose Detail is fit for the caller: it repeats
// nothing of the request but names of members that the standard gives.

// extensions is an array of objects with vendors' members (clause 6.2).
type extensions []map[string]jsontext.Value

// keyRequestObject is a Key request on the wire (Table 10). A pointer tells what is
// absent or null, which we take as the same, from a zero.
type keyRequestObject struct {
	Number     *int       `json:"number,omitzero"`
	Size       *int       `json:"size,omitzero"`
	Additional []*string  `json:"additional_slave_SAE_IDs,omitzero"`
	Mandatory  extensions `json:"extension_mandatory,omitzero"`
	Optional   extensions `json:"extension_optional,omitzero"`
}

// keyIDsObject is a Key IDs on the wire (Table 12). The extensions that it may
// have carry nothing for us and are ignored, whatever they are.
type keyIDsObject struct {
	KeyIDs []keyIDObject `json:"key_IDs"`
}

type keyIDObject struct {
	KeyID *string `json:"key_ID"`
}

// parsePathSAE reads the SAE ID in a path segment. The router hands the segment on
// still escaped when, and only when, the request's path has a raw form.
func parsePathSAE(segment string, escaped bool) (identity.SAE, error) {
	if escaped {
		var err error
		if segment, err = url.PathUnescape(segment); err != nil {
			return identity.SAE{}, invalid(err, "the SAE ID in the path is not URL-encoded")
		}
	}
	sae, err := identity.ParseSAE(segment)
	if err != nil {
		return identity.SAE{}, invalid(err, "the SAE ID in the path shall be 1 to 512 bytes of printable UTF-8")
	}
	return sae, nil
}

// parseKeyRequest reads the body of a POST of Get key, by master for slave. No
// body at all asks for the defaults, as {} does.
func parseKeyRequest(body []byte, master, slave identity.SAE, l Limits) (KeyRequest, error) {
	var o keyRequestObject
	if len(body) > 0 {
		if err := decode(body, &o); err != nil {
			return KeyRequest{}, err
		}
	}
	if l.Strict {
		if err := checkStrictly(body, o); err != nil {
			return KeyRequest{}, err
		}
	}
	number, size := 1, l.KeySize
	if o.Number != nil {
		number = *o.Number
	}
	if o.Size != nil {
		size = *o.Size
	}
	if slices.ContainsFunc(o.Mandatory, isNull) || slices.ContainsFunc(o.Optional, isNull) {
		return KeyRequest{}, problem.New(problem.Invalid, "extension_mandatory and extension_optional shall be arrays of objects")
	}
	wanted, err := o.Mandatory.wishes(l)
	if err != nil {
		return KeyRequest{}, err
	}
	if wanted.ttl == 0 {
		wanted.ttl = o.Optional.ttl(l)
	}
	additional, err := parseAdditional(o.Additional, master, slave, l)
	if err != nil {
		return KeyRequest{}, err
	}
	return KeyRequest{Number: number, Bits: size, AdditionalSlaves: additional, Provenance: wanted.provenance, TTL: wanted.ttl}, checkAmount(number, size, l)
}

// checkStrictly refuses what is otherwise taken as absent.
func checkStrictly(body []byte, o keyRequestObject) error {
	if o.Additional != nil && len(o.Additional) == 0 {
		return problem.New(problem.Invalid, "additional_slave_SAE_IDs shall name at least one SAE")
	}
	var members map[string]jsontext.Value
	_ = json.Unmarshal(body, &members) // an object, as decode has seen, or nothing
	for _, name := range []string{"number", "size", "additional_slave_SAE_IDs", "extension_mandatory", "extension_optional"} {
		if v, ok := members[name]; ok && v.Kind() == 'n' {
			return problem.New(problem.Invalid, "%s shall not be null", name)
		}
	}
	return nil
}

// parseKeyRequestQuery reads the query of a GET of Get key: number and size at
// most. Anything else would need a POST (clause 6.2), so it is not dropped silently.
func parseKeyRequestQuery(query string, l Limits) (KeyRequest, error) {
	values, err := parseQuery(query, "number", "size")
	if err != nil {
		return KeyRequest{}, err
	}
	r := KeyRequest{Number: 1, Bits: l.KeySize}
	if values.Has("number") {
		if r.Number, err = parseDecimal(values.Get("number")); err != nil {
			return KeyRequest{}, invalid(err, "number shall be a decimal integer")
		}
	}
	if values.Has("size") {
		if r.Bits, err = parseDecimal(values.Get("size")); err != nil {
			return KeyRequest{}, invalid(err, "size shall be a decimal integer")
		}
	}
	return r, checkAmount(r.Number, r.Bits, l)
}

// parseKeyIDs reads the body of a POST of Get key with key IDs.
func parseKeyIDs(body []byte, l Limits) ([]key.ID, error) {
	var o keyIDsObject
	if err := decode(body, &o); err != nil {
		return nil, err
	}
	switch n := len(o.KeyIDs); {
	case n == 0:
		return nil, problem.New(problem.Invalid, "key_IDs shall name at least one key")
	case n > l.MaxPerRequest:
		return nil, problem.New(problem.Invalid, "key_IDs shall name at most %d keys", l.MaxPerRequest)
	}
	ids := make([]key.ID, len(o.KeyIDs))
	seen := make(map[key.ID]bool, len(o.KeyIDs))
	for i, k := range o.KeyIDs {
		if k.KeyID == nil {
			return nil, problem.New(problem.Invalid, "each entry of key_IDs shall have a key_ID")
		}
		id, err := parseKeyID(*k.KeyID)
		if err != nil {
			return nil, err
		}
		if seen[id] {
			return nil, problem.New(problem.Invalid, "key_IDs shall not name a key twice")
		}
		ids[i], seen[id] = id, true
	}
	return ids, nil
}

// parseKeyIDsQuery reads the query of a GET of Get key with key IDs: one key_ID.
func parseKeyIDsQuery(query string) ([]key.ID, error) {
	values, err := parseQuery(query, "key_ID")
	if err != nil {
		return nil, err
	}
	if !values.Has("key_ID") {
		return nil, problem.New(problem.Invalid, "key_ID is missing")
	}
	id, err := parseKeyID(values.Get("key_ID"))
	if err != nil {
		return nil, err
	}
	return []key.ID{id}, nil
}

// checkPost refuses a POST whose body is not announced as JSON, or whose query has
// what belongs into the body. An empty body needs no announcement.
func checkPost(contentType, query string, body []byte) error {
	values, err := url.ParseQuery(query)
	if err != nil {
		return invalid(err, "the query is malformed")
	}
	for _, name := range []string{"number", "size", "key_ID"} {
		if values.Has(name) {
			return problem.New(problem.Invalid, "%s belongs into the body of a POST", name)
		}
	}
	if len(body) == 0 {
		return nil
	}
	if media, _, err := mime.ParseMediaType(contentType); media != "application/json" {
		return invalid(err, "the content type shall be application/json")
	}
	return nil
}

func parseQuery(query string, allowed ...string) (url.Values, error) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return nil, invalid(err, "the query is malformed")
	}
	for name, v := range values {
		switch {
		case !slices.Contains(allowed, name):
			return nil, invalid(fmt.Errorf("parameter %.40q", name), "a parameter of the query is not known here: use POST")
		case len(v) > 1:
			return nil, problem.New(problem.Invalid, "%s shall not be given twice", name)
		}
	}
	return values, nil
}

// parseDecimal reads an integer as JSON writes one that is not negative: digits,
// and no zero before another.
func parseDecimal(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0, fmt.Errorf("reading a decimal: %w", err)
	}
	if strconv.Itoa(n) != s {
		return 0, fmt.Errorf("%.20q is not how %d is written", s, n)
	}
	return n, nil
}

func parseKeyID(s string) (key.ID, error) {
	id, err := key.ParseID(s)
	if err != nil {
		return key.ID{}, invalid(err, "key_ID shall be a UUID of 36 characters")
	}
	return id, nil
}

// parseAdditional reads additional_slave_SAE_IDs; none and an empty array are alike.
func parseAdditional(names []*string, master, slave identity.SAE, l Limits) ([]identity.SAE, error) {
	if len(names) > l.MaxSAEs {
		return nil, problem.New(problem.Invalid, "additional_slave_SAE_IDs shall have at most %d entries", l.MaxSAEs)
	}
	var saes []identity.SAE
	for _, name := range names {
		if name == nil {
			return nil, problem.New(problem.Invalid, "additional_slave_SAE_IDs shall be an array of strings")
		}
		sae, err := identity.ParseSAE(*name)
		if err != nil {
			return nil, invalid(err, "an entry of additional_slave_SAE_IDs is not an SAE ID")
		}
		if sae == master || sae == slave || slices.Contains(saes, sae) {
			return nil, problem.New(problem.Invalid, "additional_slave_SAE_IDs shall name each SAE once, and neither the master nor the slave")
		}
		saes = append(saes, sae)
	}
	return saes, nil
}

// checkAmount holds number and size (bits) to the limits. A size that is no
// multiple of 8 gets the standard's own message even if it is out of range too.
func checkAmount(number, size int, l Limits) error {
	switch {
	case size%8 != 0:
		return problem.New(problem.Invalid, msgMultipleOf8)
	case size < l.MinSize || size > l.MaxSize:
		return problem.New(problem.Invalid, "size shall be %d to %d bits", l.MinSize, l.MaxSize)
	case number < 1 || number > l.MaxPerRequest:
		return problem.New(problem.Invalid, "number shall be 1 to %d", l.MaxPerRequest)
	}
	return nil
}

func isNull(object map[string]jsontext.Value) bool { return object == nil }

// wishes are what extension_mandatory asks for.
type wishes struct {
	provenance key.Provenance
	ttl        time.Duration
}

// wishes reads extension_mandatory: it knows two names. Members of other names are not
// supported; two values of one, or a value that is none, cannot be met.
func (x extensions) wishes(l Limits) (w wishes, err error) {
	var names []string
	met := true
	for _, object := range x {
		for name, value := range object {
			switch name {
			case provenanceName:
				var p key.Provenance
				met = met && json.Unmarshal(value, &p) == nil && p != "" && (w.provenance == "" || p == w.provenance)
				w.provenance = p
			case ttlName:
				ttl := lifetime(value, l)
				met = met && ttl > 0 && (w.ttl == 0 || ttl == w.ttl)
				w.ttl = ttl
			default:
				names = append(names, name)
			}
		}
	}
	if len(names) > 0 {
		slices.Sort(names)
		return wishes{}, &problem.Error{Kind: problem.Invalid, Detail: msgMandatory, Err: unsupported(slices.Compact(names))}
	}
	if !met {
		return wishes{}, Unmet(errors.New("no provenance, or no lifetime that may be asked for, is like that"))
	}
	return w, nil
}

// ttl is the lifetime that extension_optional asks for; 0 if it asks for none, for two,
// or for one that cannot be had.
func (x extensions) ttl(l Limits) (ttl time.Duration) {
	for _, object := range x {
		if value, ok := object[ttlName]; ok {
			if ttl != 0 {
				return 0
			}
			ttl = lifetime(value, l)
		}
	}
	return ttl
}

// lifetime reads a number of seconds that may be asked for; 0 if it is none.
func lifetime(value jsontext.Value, l Limits) time.Duration {
	var seconds int64
	if json.Unmarshal(value, &seconds) != nil || seconds < 1 || seconds > int64(l.MaxTTL/time.Second) {
		return 0
	}
	return time.Duration(seconds) * time.Second
}

// Unmet is the standard's answer to a member of extension_mandatory that is known and
// cannot be had (clause 6.2). why is for the operator.
func Unmet(why error) error { return invalid(why, msgUnmet) }

// decode reads one JSON object into what into points at: exact member names, none
// twice, valid UTF-8, nothing after it. Unknown members are ignored.
func decode(body []byte, into any) error {
	if trimmed := bytes.TrimLeft(body, " \t\r\n"); len(trimmed) == 0 || trimmed[0] != '{' {
		return problem.New(problem.Invalid, "the body shall be a JSON object")
	}
	err := json.Unmarshal(body, into)
	var semantic *json.SemanticError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, jsontext.ErrDuplicateName):
		return invalid(err, "the body has a member twice")
	case errors.As(err, &semantic):
		return invalid(err, "%s in the body is of the wrong type or out of range", semantic.JSONPointer)
	}
	return invalid(err, "the body is not well-formed JSON")
}

// invalid says detail to the caller and err to the operator.
func invalid(err error, detail string, args ...any) error {
	p := problem.New(problem.Invalid, detail, args...)
	p.Err = err
	return p
}
