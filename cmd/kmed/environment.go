package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/qutemail/kme/internal/handover"
	"github.com/qutemail/kme/internal/legacy"
)

// Environment is what is said by the variables of the QuteMail service that kmed
// replaces, so that its unit and .env files go on to work. Each that is honoured gets a
// line in the log; those that must not be believed any more keep kmed from starting.
type Environment struct {
	Database   string        // DATABASE_URL, instead of database
	Host, Port string        // KM_HOST, KM_PORT: where the SAE door listens, instead of network.yaml
	KeyBits    int           // QKD_KEY_SIZE: of a key asked for without a size, on the QuteMail routes
	TTL        time.Duration // QKD_KEY_TTL, in seconds: likewise
	notes      []string
}

// ReadEnvironment reads the variables. Its error names each that is refused, and why.
func ReadEnvironment(getenv func(string) string) (Environment, error) {
	var e Environment
	var errs []error
	refuse := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	honour := func(name, means string) { e.notes = append(e.notes, name+" is set: "+means) }
	if getenv("KM_ENCRYPTION_KEY") != "" {
		refuse("KM_ENCRYPTION_KEY is set: keys are sealed in the HSM now, and a key in the environment protects nothing. Take it away (and destroy it, with the old database)")
	}
	if url := getenv("DATABASE_URL"); url != "" {
		switch scheme, _, _ := strings.Cut(url, ":"); scheme {
		case "postgres", "postgresql":
			e.Database = url
			honour("DATABASE_URL", "it is used instead of database in the configuration")
		case "sqlite":
			refuse("DATABASE_URL is a SQLite file: only Postgres keeps what was promised when a node dies. The lab (kmelab up) starts a private one by itself")
		default:
			refuse("DATABASE_URL is of scheme %q: postgresql://... is what can be used", scheme)
		}
	}
	if host := getenv("KM_HOST"); host != "" {
		e.Host = host
		honour("KM_HOST", "the SAE door listens at "+host)
	}
	if port := getenv("KM_PORT"); port != "" {
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			refuse("KM_PORT is %q: a port, 1 to 65535", port)
		}
		e.Port = port
		honour("KM_PORT", "the SAE door listens at port "+port+", by TLS with client certificates only")
	}
	if bits := getenv("QKD_KEY_SIZE"); bits != "" {
		n, err := strconv.Atoi(bits)
		if err != nil || n < handover.MinBits || n > handover.MaxBits || n%8 != 0 {
			refuse("QKD_KEY_SIZE is %q: bits, %d to %d in steps of 8", bits, handover.MinBits, handover.MaxBits)
		}
		e.KeyBits = n
		honour("QKD_KEY_SIZE", "keys asked for without a size on the QuteMail routes have "+bits+" bits")
	}
	if ttl := getenv("QKD_KEY_TTL"); ttl != "" {
		n, err := strconv.Atoi(ttl)
		if err != nil || n < 1 || n > int(handover.MaxTTL/time.Second) {
			refuse("QKD_KEY_TTL is %q: seconds, 1 to %d", ttl, int(handover.MaxTTL/time.Second))
		}
		e.TTL = time.Duration(n) * time.Second
		honour("QKD_KEY_TTL", "keys asked for without a lifetime on the QuteMail routes live for "+ttl+" s")
	}
	if getenv("KM_DEBUG") != "" {
		honour("KM_DEBUG", "it means nothing any more (--log-level=debug)")
	}
	return e, errors.Join(errs...)
}

// log says what is honoured.
func (e Environment) log(log *slog.Logger) {
	for _, note := range e.notes {
		log.Warn("of the environment: " + note)
	}
}

// address is where the SAE door listens that network.yaml lets listen at address.
func (e Environment) address(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return address // policies have judged it
	}
	if e.Host != "" {
		host = e.Host
	}
	if e.Port != "" {
		port = e.Port
	}
	return net.JoinHostPort(host, port)
}

// limits are l with the defaults of the environment.
func (e Environment) limits(l legacy.Limits) legacy.Limits {
	if e.KeyBits != 0 {
		l.KeySize = e.KeyBits
	}
	if e.TTL != 0 {
		l.TTL = min(e.TTL, l.MaxTTL)
	}
	return l
}
