package admin

import (
	"fmt"
	"net/http"
	"net/url"

	"github.com/qutemail/kme/internal/approval"
	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// consoleAct is something that an operator may have done from the console: asked for on
// a page that says what will be, and done by the form on it.
type consoleAct struct {
	Path, Name, Says string
	duty             identity.Duty
	run              func(x *exchange, given []approval.Approval) (done string, err error)

	ofSAE   bool   // the query, and then the form, names an SAE; it is asked for at the list of SAEs
	ofFiles bool   // the page, and then the form, says which files of policies are meant
	reason  bool   // the form asks for a reason
	act     string // what officers sign where a site wants two; an SAE's ID follows, or the digest of the files. "": it takes one everywhere
}

// acts are those that there are.
func (c Config) acts() []consoleAct {
	return []consoleAct{
		{
			"/console/acts/cleanup", "End overdue keys", "Keys whose lifetime is over are ended now, rather than within the next seconds. Nothing else is touched.",
			identity.Operating,
			func(x *exchange, given []approval.Approval) (string, error) {
				n, err := c.Backend.Cleanup(x.r.Context(), x.caller, x.rid, given)
				return fmt.Sprintf("%d overdue keys were ended.", n), err
			},
			false, false, false, "cleanup",
		},
		{
			"/console/acts/reload", "Read policies anew", "The files of policies are put in force at this node as they are now; or, if anything is wrong with them, none of them.",
			identity.Operating,
			func(x *exchange, given []approval.Approval) (string, error) {
				p, err := c.Backend.ReloadPolicies(x.r.Context(), x.caller, x.rid, given, Policies{x.r.PostFormValue("files")})
				return fmt.Sprintf("The policies in force have the digest %.16s.", p.Digest), err
			},
			false, true, false, "reload-policies",
		},
		{
			"/console/acts/disable", "Shut out", "It is shut out at every node of this site, within a second, whatever certificates it has. Keys that it was named for stay.",
			identity.Operating,
			func(x *exchange, _ []approval.Approval) (string, error) {
				sae, err := x.formSAE()
				if err != nil {
					return "", err
				}
				reason := x.r.PostFormValue("reason")
				if reason == "" || len(reason) > maxReason {
					return "", refusal{problem.New(problem.Invalid, "a reason of 1 to %d bytes is wanted", maxReason)}
				}
				return sae.String() + " is shut out.", c.Backend.DisableSAE(x.r.Context(), x.caller, x.rid, sae, reason)
			},
			true, false, true, "",
		},
		{
			"/console/acts/enable", "Let in again", "It is let in again at every node of this site, if a rule names its certificate.",
			identity.SecurityOfficer,
			func(x *exchange, given []approval.Approval) (string, error) {
				sae, err := x.formSAE()
				if err != nil {
					return "", err
				}
				return sae.String() + " is let in again.", c.Backend.EnableSAE(x.r.Context(), x.caller, x.rid, given, sae)
			},
			true, false, false, "enable-sae",
		},
	}
}

func (c Config) listActs(*exchange) (content, error) {
	var list []consoleAct
	for _, a := range c.acts() {
		if !a.ofSAE {
			list = append(list, a)
		}
	}
	return content{title: "Acts", name: "acts", data: list}, nil
}

// saesView is what the page of SAEs shows.
type saesView struct {
	SAEs         []SAE
	Certificates []Certificate
	Known        bool // the certificates are
}

// saesPage lists the SAEs of the network, what may be done about each, and with which
// certificates they came.
func (c Config) saesPage(x *exchange) (content, error) {
	saes, err := c.Backend.SAEs(x.r.Context(), x.caller, x.rid)
	data := saesView{SAEs: saes, Known: c.Certificates != nil}
	if data.Known {
		data.Certificates = c.Certificates()
	}
	return content{title: "SAEs", name: "saes", data: data}, err
}

// formSAE is the SAE that a form names.
func (x *exchange) formSAE() (identity.SAE, error) {
	sae, err := identity.ParseSAE(x.r.PostFormValue("sae"))
	if err != nil {
		return sae, refusal{problem.New(problem.Invalid, "no SAE is named: %v", err)}
	}
	return sae, nil
}

// confirmation is a page that asks whether something is to be done.
type confirmation struct {
	Says, Action, Button, Back string
	Files                      string // the digest of those that are meant; "" if none are
	Reason                     bool   // a reason is asked for
	Fields                     []field
	Second                     *secondOfficer // nil: it takes one officer everywhere
}

// field is what the form of a confirmation carries on.
type field struct{ Name, Value string }

// ask shows what will be done, and the form that does it.
func (a consoleAct) ask(x *exchange) (content, error) {
	form := confirmation{Says: a.Says, Action: a.Path, Button: a.Name, Back: "/console/acts", Reason: a.reason}
	title := a.Name + "?"
	if a.ofSAE {
		sae := x.r.URL.Query().Get("sae")
		title, form.Back, form.Fields = a.Name+": "+sae+"?", "/console/saes", []field{{"sae", sae}}
	}
	if a.ofFiles {
		files, err := x.c.Backend.PolicyFiles(x.r.Context(), x.caller, x.rid)
		if err != nil {
			return content{}, err
		}
		form.Files, form.Fields = files.Digest, []field{{"files", files.Digest}}
	}
	if a.act != "" {
		act, err := a.signed(form.Fields)
		if err != nil {
			return content{}, refusal{problem.Because(problem.Invalid, err)}
		}
		second, err := x.second(act)
		if err != nil {
			return content{}, err
		}
		if form.Second = &second; second.Other != "" {
			form.Fields = append(form.Fields, field{"other", second.Nonce})
		}
	}
	return content{title: title, name: "confirm", data: form}, nil
}

// signed is what officers sign for it, done to what the fields name.
func (a consoleAct) signed(fields []field) (approval.Act, error) {
	var on []string
	for _, f := range fields {
		on = append(on, f.Value)
	}
	return approval.NewAct(a.act, on...)
}

// isOf says whether officers sign the act with something that it is done to.
func (a consoleAct) isOf() bool { return a.ofSAE || a.ofFiles }

// path is the address of the page that asks for it, of that SAE if it is of one.
func (a consoleAct) path(sae string) string {
	if !a.ofSAE {
		return a.Path
	}
	return a.Path + "?" + url.Values{"sae": {sae}}.Encode()
}

// do has it done, at the word of our own page.
func (a consoleAct) do(x *exchange) (content, error) {
	if err := ownPage(x.r); err != nil {
		return content{}, refusal{err}
	}
	if err := x.may(a.duty); err != nil {
		return content{}, refusal{err}
	}
	x.r.Body = http.MaxBytesReader(x.w, x.r.Body, maxBody)
	given, err := x.given()
	if err != nil {
		return content{}, err
	}
	done, err := a.run(x, given)
	if err != nil {
		return content{}, err
	}
	back := "/console/acts"
	if a.ofSAE {
		back = "/console/saes"
	}
	return content{title: "Done", name: "message", data: message{Says: done, Back: back}}, nil
}

// ownPage is nil unless a browser says that another site's page has sent the request:
// it would carry the operator's certificate all the same.
func ownPage(r *http.Request) error {
	if err := http.NewCrossOriginProtection().Check(r); err != nil {
		return problem.Because(problem.Forbidden, err)
	}
	return nil
}
