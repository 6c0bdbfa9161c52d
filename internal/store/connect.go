package store

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/qutemail/kme/internal/deadpeer"
)

// hostTime bounds the connecting to one host of the DSN where it names no
// connect_timeout, so that one that swallows packets does not stand in the way of
// the next.
const hostTime = 2 * time.Second

// parse reads the DSN and adds what each connection of the store has.
func parse(cfg Config) (*pgxpool.Config, error) {
	config, err := pgxpool.ParseConfig(cfg.DSN)
	if err != nil {
		return nil, err
	}
	conn := config.ConnConfig
	for name, value := range pointLookups {
		conn.RuntimeParams[name] = value
	}
	conn.RuntimeParams["application_name"] = appName(cfg.Node)
	conn.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite // whatever the DSN says: a standby is of no use
	if conn.ConnectTimeout == 0 {
		conn.ConnectTimeout = hostTime
	}
	dial := conn.DialFunc
	conn.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := dial(ctx, network, addr)
		if err == nil {
			deadpeer.Notice(c)
		}
		return c, err
	}
	config.PingTimeout = hostTime // of a connection that was idle, before a read is sent on it
	config.BeforeConnect = func(_ context.Context, conn *pgx.ConnConfig) error {
		neverCancel(conn)
		return nil
	}
	return config, nil
}

var errNoCancel = errors.New("the store cancels nothing")

// neverCancel prepares one connection. pgx has the server cancel whatever runs on a
// connection that it gives up: it would also end a COMMIT's wait for its standby.
// The transaction then stands on the primary, for all to see, and a failover takes
// it back. So once the connection is there, nothing more is dialled for it. What a
// broken connection leaves behind ends by client_connection_check_interval, which
// does not touch a commit.
func neverCancel(config *pgx.ConnConfig) {
	var connected atomic.Bool
	dial := config.DialFunc
	config.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if connected.Load() {
			return nil, errNoCancel
		}
		return dial(ctx, network, addr)
	}
	config.AfterConnect = func(context.Context, *pgconn.PgConn) error {
		connected.Store(true)
		return nil
	}
}

// dial makes a new connection of the committer's, in one try of each host. One
// more is allowed for: the host that pgx falls back to.
func (c *committer) dial() (*pgx.Conn, error) {
	config := c.config.Copy()
	neverCancel(config)
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		if n.SeverityUnlocalized == "WARNING" && n.Code == "01000" {
			c.warning = n.Message
		}
	}
	hosts := len(config.Fallbacks) + 2
	ctx, cancel := context.WithTimeout(c.stop, time.Duration(hosts)*config.ConnectTimeout)
	defer cancel()
	return pgx.ConnectConfig(ctx, config)
}
