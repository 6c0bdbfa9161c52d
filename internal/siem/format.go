// Package siem sends a site's audit log to those who watch over many: as JSON Lines,
// as syslog (RFC 5424) over TLS (RFC 5425) or as OCSF.
//
// What it promises: every leaf of the log is sent at least once, in order, to each
// sink, with the log's name and the number of the leaf as its identity; where a sink
// has got to is kept in the database and moves on only when a file has what was sent, or
// a connection has lasted for a minute since it took it. A sink that is away holds up
// nobody: it is tried again, and gets what it missed. The log keeps what is still to be
// sent.
//
// What it must never do: touch the database's events, or what delivers keys.
package siem

import (
	"cmp"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/qutemail/kme/internal/audit"
)

// Record is one leaf to be sent.
type Record struct {
	Log   string // the log's name
	Leaf  int64
	Text  []byte // the canonical text
	Event audit.Event
}

// Format writes one record as one line or message, without its end.
type Format func(b []byte, r Record) ([]byte, error)

// Formats are those that a sink may have, by their names.
var Formats = map[string]Format{"jsonl": JSONLine, "syslog": Syslog, "ocsf": OCSF}

// JSONLine is the canonical text in an object with its identity.
func JSONLine(b []byte, r Record) ([]byte, error) {
	b = append(b, `{"log":`...)
	name, err := json.Marshal(r.Log)
	if err != nil {
		return nil, fmt.Errorf("writing a line: %w", err)
	}
	b = append(append(b, name...), `,"leaf":`...)
	b = strconv.AppendInt(b, r.Leaf, 10)
	b = append(append(b, `,"event":`...), r.Text...)
	return append(b, '}'), nil
}

// Numbers of RFC 5424, 6.2.1: the facility of audit logs, and the severities that are used.
const (
	facilityAudit   = 13
	severityWarning = 4
	severityNotice  = 5
	severityInfo    = 6
)

// enterprise is the example of RFC 5612, for whoever has no number of its own.
const enterprise = "32473"

// Syslog is a message of RFC 5424. The structured data holds what is searched for; the
// message is the canonical text, in UTF-8 behind a byte order mark as 6.4 asks.
func Syslog(b []byte, r Record) ([]byte, error) {
	e := r.Event
	severity := severityInfo
	switch {
	case e.Outcome == audit.Failed:
		severity = severityWarning
	case e.Outcome == audit.Refused:
		severity = severityNotice
	}
	b = fmt.Appendf(b, "<%d>1 %s %s kmed - %s ", facilityAudit*8+severity, e.At.UTC().Format("2006-01-02T15:04:05.000Z"), syslogName(e.Site+"."+e.Node, 255), syslogName(string(e.Action), 32))
	b = append(b, "[kme@"+enterprise...)
	for _, p := range [][2]string{
		{"log", r.Log},
		{"leaf", strconv.FormatInt(r.Leaf, 10)},
		{"outcome", string(e.Outcome)},
		{"role", e.Actor.Role},
		{"actor", e.Actor.ID},
		{"remote", e.Actor.Remote},
		{"serial", e.Actor.Serial},
		{"request", e.Request},
		{"peer", e.Peer},
		{"master", e.Master},
	} {
		if p[1] != "" {
			b = append(b, ' ')
			b = append(append(b, p[0]...), '=', '"')
			b = append(b, paramEscaper.Replace(oneLine(p[1]))...)
			b = append(b, '"')
		}
	}
	b = append(b, "] \ufeff"...)
	return append(b, r.Text...), nil
}

// paramEscaper is RFC 5424, 6.3.3.
var paramEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `]`, `\]`)

// oneLine is s without control characters, which 6.4 of the RFC has nobody send, and which
// would end a message in a file.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// syslogName is a header field: printable US-ASCII without spaces, or "-".
func syslogName(s string, longest int) string {
	s = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '_'
		}
		return r
	}, s)
	if s = s[:min(len(s), longest)]; s == "" {
		return "-"
	}
	return s
}

// ocsfEvent is what is said in OCSF 1.1: API Activity (6003) for requests, and
// Application Lifecycle (6002) for what a node does by itself.
type ocsfEvent struct {
	ActivityID   int           `json:"activity_id"`
	ActivityName string        `json:"activity_name"`
	CategoryUID  int           `json:"category_uid"`
	ClassUID     int           `json:"class_uid"`
	TypeUID      int           `json:"type_uid"`
	SeverityID   int           `json:"severity_id"`
	StatusID     int           `json:"status_id"`
	StatusDetail string        `json:"status_detail,omitzero"`
	Time         int64         `json:"time"`
	Metadata     ocsfMetadata  `json:"metadata"`
	Actor        *ocsfActor    `json:"actor,omitzero"`
	API          *ocsfAPI      `json:"api,omitzero"`
	App          *ocsfProduct  `json:"app,omitzero"`
	Source       *ocsfEndpoint `json:"src_endpoint,omitzero"`
	RawData      string        `json:"raw_data,omitzero"`
	Unmapped     *ocsfUnmapped `json:"unmapped,omitzero"`
}

// ocsfUnmapped has the event's text where it is too long for a string.
type ocsfUnmapped struct {
	Event jsontext.Value `json:"event"`
}

type ocsfMetadata struct {
	Version  string      `json:"version"`
	UID      string      `json:"uid"`
	LogName  string      `json:"log_name"`
	Sequence int64       `json:"sequence"`
	Product  ocsfProduct `json:"product"`
}

type ocsfProduct struct {
	Name    string `json:"name"`
	Vendor  string `json:"vendor_name"`
	Version string `json:"version,omitzero"`
}

type ocsfActor struct {
	User ocsfUser `json:"user"`
}

type ocsfUser struct {
	Name       string `json:"name"`
	Type       string `json:"type,omitzero"`
	Credential string `json:"credential_uid,omitzero"` // the certificate's serial number
}

type ocsfAPI struct {
	Operation string      `json:"operation"`
	Request   ocsfRequest `json:"request"`
}

type ocsfRequest struct {
	UID string `json:"uid"`
}

type ocsfEndpoint struct {
	Name string `json:"name,omitzero"`
	IP   string `json:"ip,omitzero"`
	Port uint16 `json:"port,omitzero"`
}

// Numbers of OCSF.
const (
	ocsfApplication = 6
	ocsfLifecycle   = 6002
	ocsfAPIActivity = 6003
	ocsfOther       = 99
	ocsfSuccess     = 1
	ocsfFailure     = 2
	ocsfInfo        = 1
	ocsfLow         = 2
	ocsfMedium      = 3
	ocsfLongest     = 65535 // characters of a string
)

// ocsfUnknown is the name of a caller or a place that the event does not name.
const ocsfUnknown = "unknown"

// OCSF is one event of the Open Cybersecurity Schema Framework.
func OCSF(b []byte, r Record) ([]byte, error) {
	e := r.Event
	product := ocsfProduct{Name: "KME", Vendor: "QuteMail"}
	o := ocsfEvent{
		ActivityID: ocsfOther, ActivityName: string(e.Action), CategoryUID: ocsfApplication, ClassUID: ocsfLifecycle,
		SeverityID: ocsfInfo, StatusID: ocsfSuccess, StatusDetail: e.Reason, Time: e.At.UnixMilli(), RawData: string(r.Text),
		Metadata: ocsfMetadata{Version: "1.1.0", UID: fmt.Sprintf("%s#%d", r.Log, r.Leaf), LogName: r.Log, Sequence: r.Leaf, Product: product},
	}
	if len(r.Text) > ocsfLongest {
		o.RawData, o.Unmapped = "", &ocsfUnmapped{r.Text}
		o.StatusDetail = strings.ToValidUTF8(e.Reason[:min(len(e.Reason), ocsfLongest)], "")
	}
	switch e.Outcome {
	case audit.Refused:
		o.StatusID, o.SeverityID = ocsfFailure, ocsfLow
	case audit.Failed:
		o.StatusID, o.SeverityID = ocsfFailure, ocsfMedium
	}
	if e.Request == "" {
		o.App = &product
	} else {
		o.ClassUID = ocsfAPIActivity
		o.API = &ocsfAPI{Operation: string(e.Action), Request: ocsfRequest{e.Request}}
		o.Actor = &ocsfActor{ocsfUser{Name: cmp.Or(e.Actor.ID, ocsfUnknown), Type: e.Actor.Role, Credential: e.Actor.Serial}}
		o.Source = endpoint(e.Actor.Remote)
	}
	o.TypeUID = o.ClassUID*100 + o.ActivityID
	text, err := json.Marshal(o, jsontext.PreserveRawStrings(true)) // of the event's text, if that is unmapped
	if err != nil {
		return nil, fmt.Errorf("writing an OCSF event: %w", err)
	}
	return append(b, text...), nil
}

// endpoint is where a request came from.
func endpoint(remote string) *ocsfEndpoint {
	at, err := netip.ParseAddrPort(remote)
	if err != nil {
		return &ocsfEndpoint{Name: ocsfUnknown}
	}
	return &ocsfEndpoint{IP: at.Addr().Unmap().WithZone("").String(), Port: at.Port()}
}
