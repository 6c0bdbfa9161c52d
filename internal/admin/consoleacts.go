package admin

import (
	"fmt"
	"net/http"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/problem"
)

// consoleAct is something that an operator may have done from the console: asked for on
// a page that says what will be, and done by the form on it.
type consoleAct struct {
	Path, Name, Says string
	duty             identity.Duty
	run              func(*exchange) (done string, err error)
}

// acts are those that there are.
func (c Config) acts() []consoleAct {
	return []consoleAct{
		{
			"/console/acts/cleanup", "End overdue keys", "Keys whose lifetime is over are ended now, rather than within the next seconds. Nothing else is touched.",
			identity.Operating,
			func(x *exchange) (string, error) {
				n, err := c.Backend.Cleanup(x.r.Context(), x.caller, x.rid, nil)
				return fmt.Sprintf("%d overdue keys were ended.", n), err
			},
		},
	}
}

func (c Config) listActs(*exchange) (content, error) {
	return content{title: "Acts", name: "acts", data: c.acts()}, nil
}

// confirmation is a page that asks whether something is to be done.
type confirmation struct {
	Says, Action, Button, Back string
	Reason                     bool // a reason is asked for
	Fields                     []field
}

// field is what the form of a confirmation carries on.
type field struct{ Name, Value string }

// ask shows what will be done, and the form that does it.
func (a consoleAct) ask(*exchange) (content, error) {
	return content{title: a.Name + "?", name: "confirm", data: confirmation{Says: a.Says, Action: a.Path, Button: a.Name, Back: "/console/acts"}}, nil
}

// do has it done, at the word of our own page.
func (a consoleAct) do(x *exchange) (content, error) {
	if err := ownPage(x.r); err != nil {
		return content{}, err
	}
	if err := x.may(a.duty); err != nil {
		return content{}, refusal{err}
	}
	done, err := a.run(x)
	if err != nil {
		return content{}, err
	}
	return content{title: "Done", name: "message", data: message{Says: done, Back: "/console/acts"}}, nil
}

// ownPage is nil unless a browser says that another site's page has sent the request:
// it would carry the operator's certificate all the same.
func ownPage(r *http.Request) error {
	if err := http.NewCrossOriginProtection().Check(r); err != nil {
		return problem.Because(problem.Forbidden, err)
	}
	return nil
}
