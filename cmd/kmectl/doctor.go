package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/qutemail/kme/internal/admin"
)

type doctorCommand struct{}

// doctorNode is what was found out about one node.
type doctorNode struct {
	KME      string          `json:"kme"`
	Findings []admin.Finding `json:"findings"`
}

// Run has each node look at what it depends on, and looks at the way to it.
func (doctorCommand) Run(ctx context.Context, s *session) error {
	p, hc, err := s.client(operatorProfiles)
	if err != nil {
		return err
	}
	var nodes []doctorNode
	all, bad := 0, 0
	for _, base := range append([]string{p.kme}, p.more...) {
		n := doctorNode{base, examine(ctx, p, hc, base)}
		for _, f := range n.Findings {
			if all++; !f.OK {
				bad++
			}
		}
		nodes = append(nodes, n)
	}
	if s.JSON {
		err = s.printJSON(nodes)
	} else {
		_, err = s.stdout.Write(describeFindings(nodes))
	}
	if err == nil && bad > 0 {
		err = fmt.Errorf("%d of %d things are not well", bad, all)
	}
	return err
}

// examine looks at the way to a node, then asks it.
func examine(ctx context.Context, p party, hc *http.Client, base string) []admin.Finding {
	own := hc.Transport.(*http.Transport).TLSClientConfig
	found := []admin.Finding{lasts("your certificate", "step ca renew, or a new one from the operator CA", own.Certificates[0].Leaf.NotAfter)}
	server, clock, err := handshake(ctx, hc, base)
	if err != nil {
		do := "is the node running, and is this its operator door?"
		if advice, ok := errors.AsType[*advised](p.explain(err, p.unlisted())); ok {
			do = advice.next
		}
		return append(found, admin.Bad("door", do, "%v", err))
	}
	found = append(found, lasts("the door's certificate", "the node renews it by itself, if its CA answers: runbooks/certificates.md", server), clock)
	theirs, err := admin.NewClient(base, hc).Doctor(ctx)
	if err != nil {
		do := "the node's log has the cause, by the request's ID"
		if advice, ok := errors.AsType[*advised](p.explain(err, p.unlisted())); ok {
			do = advice.next
		}
		return append(found, admin.Bad("door", do, "%v", err))
	}
	return append(found, theirs...)
}

// handshake asks whether the node lives: when its certificate ends, and what it says
// the time is.
func handshake(ctx context.Context, hc *http.Client, base string) (end time.Time, clock admin.Finding, err error) {
	if u, err := url.Parse(base); err != nil || u.Host == "" {
		return end, clock, fmt.Errorf("%q is no URL", base)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/healthz", nil)
	if err != nil {
		return end, clock, err
	}
	asked := time.Now()
	res, err := hc.Do(req)
	if err != nil {
		return end, clock, err
	}
	_ = res.Body.Close()
	middle := asked.Add(time.Since(asked) / 2)
	clock = admin.Good("clock", "as here")
	at, err := http.ParseTime(res.Header.Get("Date")) // whole seconds
	if off := at.Sub(middle); err == nil && off.Abs() > 3*time.Second {
		clock = admin.Bad("clock", "NTP there, or here: runbooks/clock.md", "it is %v ahead of this machine's", off.Round(time.Second))
	}
	return leafEnd(res.TLS), clock, nil
}

func leafEnd(s *tls.ConnectionState) time.Time {
	if s == nil || len(s.PeerCertificates) == 0 {
		return time.Time{}
	}
	return s.PeerCertificates[0].NotAfter
}

// lasts says how long a certificate does.
func lasts(about, do string, end time.Time) admin.Finding {
	left := time.Until(end)
	if left < time.Hour {
		return admin.Bad(about, do, "it ends at %s", end.UTC().Format(time.RFC3339))
	}
	return admin.Good(about, "it ends in %v", left.Round(time.Minute))
}

func describeFindings(nodes []doctorNode) []byte {
	var b bytes.Buffer
	for _, n := range nodes {
		fmt.Fprintf(&b, "%s\n", n.KME)
		for _, f := range n.Findings {
			mark := "ok "
			if !f.OK {
				mark = "BAD"
			}
			fmt.Fprintf(&b, "  %s  %-22s %s\n", mark, printable(f.About), printable(f.Says))
			if f.Do != "" {
				fmt.Fprintf(&b, "       %-22s do: %s\n", "", printable(f.Do))
			}
		}
	}
	return b.Bytes()
}
