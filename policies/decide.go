package policies

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	"github.com/cedar-policy/cedar-go/x/exp/schema/validate"

	"github.com/qutemail/kme/internal/identity"
	"github.com/qutemail/kme/internal/key"
)

// decisions remembers answers.
type decisions struct {
	mu    sync.RWMutex
	known map[Question]Decision
}

// maxDecided bounds the memory: a caller may think of many questions.
const maxDecided = 4096

func (m *decisions) get(q Question) (Decision, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	d, ok := m.known[q]
	return d, ok
}

// put adds an answer. When there are too many it forgets all of them.
func (m *decisions) put(q Question, d Decision) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.known == nil || len(m.known) >= maxDecided {
		m.known = make(map[Question]Decision)
	}
	m.known[q] = d
}

// The actions of a Question.
const (
	EncKeys = "enc_keys" // Caller wants keys to share with Other
	DecKeys = "dec_keys" // Caller takes keys that Other asked for
	Status  = "status"   // Caller asks what it could get to share with Other
)

var actions = []string{EncKeys, DecKeys, Status}

// Question is what a policy decides. A request that names several slaves is one
// Question each, and all must be allowed.
type Question struct {
	Action     string
	Caller     identity.SAE   // Cedar's principal
	Other      identity.SAE   // Cedar's resource
	Bits       int            // size of each key; 0 with Status
	Number     int            // of keys; 0 with Status
	Provenance key.Provenance // of the keys
	SameKME    bool           // both are served by this KME
	Link       string         // that the keys come from; "" if none does

	// Time is when it is asked; the zero Time stands for no time that a policy could
	// mean. Group and Age are of the caller's connection, and the zero values stand for
	// one that is not to this KME.
	Time  time.Time
	Group string        // key exchange of its TLS, such as X25519MLKEM768
	Age   time.Duration // since its certificate was judged at the handshake
}

// rounded is q without what no policy of r asks about, and with times in whole
// seconds, rounded down: so that the same question is asked again and again.
func (r ruleSet) rounded(q Question) Question {
	q.Time, q.Age = q.Time.UTC().Truncate(time.Second), q.Age.Truncate(time.Second)
	if !r.asks["time"] {
		q.Time = time.Time{}
	}
	if !r.asks["verdict_age"] {
		q.Age = 0
	}
	return q
}

// Reason is how a Decision came about. It is for the audit log: from outside,
// unknown and forbidden look alike.
type Reason string

// The reasons.
const (
	Permitted   Reason = "permitted"
	Forbidden   Reason = "forbidden"    // by the policies in the Decision
	NoPolicy    Reason = "no-policy"    // none permits it
	UnknownSAE  Reason = "unknown-sae"  // not in network.yaml
	DisabledSAE Reason = "disabled-sae" // one of the two is switched off
	PolicyError Reason = "policy-error" // the policies in the Decision cannot be evaluated
)

// Decision answers a Question.
type Decision struct {
	Allow    bool
	Reason   Reason
	Policies []string // the IDs of the policies that decided, sorted; none if no policy did
}

// Types of Cedar entities.
const (
	typeSAE    cedar.EntityType = "SAE"
	typeKME    cedar.EntityType = "KME"
	typeGroup  cedar.EntityType = "Group"
	typeAction cedar.EntityType = "Action"
)

// ruleSet is the policies and what they are told of the network.
type ruleSet struct {
	policies *cedar.PolicySet
	entities cedar.EntityMap
	actions  map[string]cedar.EntityUID
	asks     map[string]bool // names that occur in the policies, as far as Decide needs to know
}

// Decide answers q. What no policy permits is refused, and one policy that forbids
// or cannot be evaluated is enough to refuse. Nobody may change what it returns.
//
// A Set never changes, so neither does its answer: the last ones are remembered.
func (s *Set) Decide(q Question) Decision {
	for _, sae := range [...]identity.SAE{q.Caller, q.Other} {
		if _, off := s.off[sae]; off {
			return Decision{Reason: DisabledSAE}
		}
	}
	q = s.rules.rounded(q)
	if d, ok := s.decided.get(q); ok {
		return d
	}
	d := s.decide(q)
	s.decided.put(q, d)
	return d
}

func (s *Set) decide(q Question) Decision {
	action, ok := s.rules.actions[q.Action]
	if !ok {
		return Decision{Reason: NoPolicy}
	}
	for _, sae := range []identity.SAE{q.Caller, q.Other} {
		if _, ok := s.SAEs[sae]; !ok {
			return Decision{Reason: UnknownSAE}
		}
	}
	verdict, why := cedar.Authorize(s.rules.policies, s.rules.entities, q.request(action))
	if len(why.Errors) > 0 {
		d := Decision{Reason: PolicyError}
		for _, e := range why.Errors {
			d.Policies = append(d.Policies, string(e.PolicyID))
		}
		slices.Sort(d.Policies)
		return d
	}
	d := Decision{Allow: verdict == cedar.Allow, Reason: Permitted}
	for _, r := range why.Reasons {
		d.Policies = append(d.Policies, string(r.PolicyID))
	}
	slices.Sort(d.Policies)
	if !d.Allow {
		d.Reason = Forbidden
		if len(d.Policies) == 0 {
			d.Reason = NoPolicy
		}
	}
	return d
}

func (q Question) request(action cedar.EntityUID) cedar.Request {
	context := cedar.RecordMap{
		"bits":       cedar.Long(q.Bits),
		"number":     cedar.Long(q.Number),
		"provenance": cedar.String(q.Provenance),
		"same_kme":   cedar.Boolean(q.SameKME),
		"link":       cedar.String(q.Link),
		"time":       types.NewDatetime(q.Time),
	}
	if q.Group != "" {
		context["tls_group"] = cedar.String(q.Group)
		context["verdict_age"] = types.NewDuration(q.Age)
	}
	return cedar.Request{Principal: saeUID(q.Caller), Action: action, Resource: saeUID(q.Other), Context: cedar.NewRecord(context)}
}

func saeUID(sae identity.SAE) cedar.EntityUID {
	return cedar.EntityUID{Type: typeSAE, ID: cedar.String(sae.String())}
}

// parseRules reads the policies and checks them, and everything that they will be
// told, against the schema.
func parseRules(files map[string][]byte, names []string, network Network) (ruleSet, error) {
	r := ruleSet{policies: cedar.NewPolicySet(), entities: entitiesOf(network), actions: make(map[string]cedar.EntityUID), asks: make(map[string]bool)}
	for _, a := range actions {
		r.actions[a] = cedar.NewEntityUID(typeAction, cedar.String(a))
	}
	check, err := parseSchema(files[SchemaFile])
	if err != nil {
		return r, err
	}
	if err := r.checkFacts(check); err != nil {
		return r, fmt.Errorf("%s does not describe what policies are told: %w", SchemaFile, err)
	}
	for _, name := range names {
		if err := r.addFile(name, files[name], check); err != nil {
			return r, err
		}
	}
	if len(maps.Collect(r.policies.All())) == 0 {
		return r, errors.New("no policy in any *.cedar file: nobody may do anything")
	}
	return r, nil
}

func parseSchema(text []byte) (*validate.Validator, error) {
	var s schema.Schema
	s.SetFilename(SchemaFile)
	if err := s.UnmarshalCedar(text); err != nil {
		return nil, err
	}
	resolved, err := s.Resolve()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", SchemaFile, err)
	}
	return validate.New(resolved), nil
}

// checkFacts makes sure that a schema that someone edited does not promise
// policies a fact that Decide does not give them.
func (r ruleSet) checkFacts(check *validate.Validator) error {
	for _, e := range r.entities {
		if err := check.Entity(e); err != nil {
			return fmt.Errorf("entity %s: %w", e.UID, err)
		}
	}
	for _, action := range r.actions {
		for _, q := range []Question{{}, {Group: "X25519MLKEM768"}} {
			if err := check.Request(q.request(action)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r ruleSet) addFile(name string, text []byte, check *validate.Validator) error {
	list, err := cedar.NewPolicyListFromBytes(name, text)
	if err != nil {
		// cedar-go says where, in a file that it calls <input>.
		why := strings.TrimPrefix(strings.TrimPrefix(err.Error(), "parser error: "), "parse error at ")
		return errors.New(strings.Replace(why, "<input>:", name+":", 1))
	}
	for _, p := range list {
		at := place{name, p.Position().Line, p.Position().Column}
		id := string(p.Annotations()["id"])
		if !plainName(id) {
			return at.errorf(`a policy needs @id("..."), [a-z0-9._@-]{1,64}: it stands in the audit log`)
		}
		if !r.policies.Add(cedar.PolicyID(id), p) {
			return at.errorf("the policy ID %s is used twice", id)
		}
		if err := check.Policy(id, (*ast.Policy)(p.AST())); err != nil {
			return at.errorf("%w", err)
		}
		text, err := p.MarshalJSON()
		if err != nil {
			return at.errorf("%w", err)
		}
		for _, name := range []string{"time", "verdict_age"} {
			if bytes.Contains(text, []byte(`"`+name+`"`)) { // it may be a string that reads so: then only memory is wasted
				r.asks[name] = true
			}
		}
	}
	return nil
}

func entitiesOf(network Network) cedar.EntityMap {
	entities := make(cedar.EntityMap)
	add := func(uid cedar.EntityUID, parents []cedar.EntityUID, attributes cedar.RecordMap) {
		entities[uid] = cedar.Entity{UID: uid, Parents: cedar.NewEntityUIDSet(parents...), Attributes: cedar.NewRecord(attributes)}
	}
	for kme := range network.KMEs {
		add(cedar.NewEntityUID(typeKME, cedar.String(kme.String())), nil, nil)
	}
	for sae, entry := range network.SAEs {
		var groups, homes []cedar.Value
		var parents []cedar.EntityUID
		for _, g := range entry.Groups {
			uid := cedar.NewEntityUID(typeGroup, cedar.String(g))
			add(uid, nil, nil)
			parents = append(parents, uid)
			groups = append(groups, uid)
		}
		for _, h := range entry.Homes {
			homes = append(homes, cedar.NewEntityUID(typeKME, cedar.String(h.String())))
		}
		add(saeUID(sae), parents, cedar.RecordMap{"groups": cedar.NewSet(groups...), "homes": cedar.NewSet(homes...)})
	}
	return entities
}
