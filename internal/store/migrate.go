package store

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

//go:embed migrations/*.sql
var migrationFiles embed.FS

// schemaVersion is the number of the newest migration: the schema that this
// program works with, and no other.
var schemaVersion = func() int64 {
	files, err := migrationFiles.ReadDir("migrations")
	if err != nil {
		panic(err) // they are part of the program
	}
	version, err := goose.NumericComponent(files[len(files)-1].Name())
	if err != nil {
		panic(err)
	}
	return version
}()

// The roles. The owner migrates, the daemon has no DDL and of the audit nothing
// but INSERT, the sequencer reads events and writes the tree over them, the auditor
// reads everything but blobs.
const (
	OwnerRole     = "kme_owner"
	AppRole       = "kme_app"
	SequencerRole = "kme_seq"
	AuditorRole   = "kme_auditor"
)

// Roles are all of them: what a DBA makes where kmed migrate may not.
var Roles = []string{OwnerRole, AppRole, SequencerRole, AuditorRole}

// Migrate brings the database that dsn names to the schema of this program, and
// fixes the length of an epoch for its life. Run by a superuser it also makes the
// roles and the schema kme; the owner's role suffices where a DBA has made them.
func Migrate(ctx context.Context, dsn string, epochLength time.Duration, log *slog.Logger) error {
	if epochLength < time.Second || epochLength%time.Millisecond != 0 {
		return fmt.Errorf("migrating: an epoch of %v is not at least a second long, in whole milliseconds", epochLength)
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return fmt.Errorf("migrating: %w", err)
	}
	cfg.RuntimeParams["search_path"] = schemaName
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return fmt.Errorf("migrating: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := makeRoles(ctx, conn); err != nil {
		return fmt.Errorf("migrating: making roles: %w", err)
	}
	if err := applyMigrations(ctx, cfg, log); err != nil {
		return fmt.Errorf("migrating: %w", err)
	}
	if err := fixEpochLength(ctx, conn, epochLength); err != nil {
		return fmt.Errorf("migrating: %w", err)
	}
	return nil
}

// makeRoles makes what is missing of the roles, of their memberships and of the schema.
// Roles belong to the cluster, so another database's migration may make them at the same
// moment.
func makeRoles(ctx context.Context, conn *pgx.Conn) error {
	for _, role := range Roles {
		var there bool
		if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role).Scan(&there); err != nil {
			return err
		}
		if there {
			continue
		}
		_, err := conn.Exec(ctx, `DO $$ BEGIN CREATE ROLE `+role+` LOGIN;
			EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL; END $$`)
		if err != nil {
			return fmt.Errorf("%s, which is missing (have a superuser say CREATE ROLE %[1]s LOGIN): %w", role, err)
		}
	}
	if err := joinRoles(ctx, conn); err != nil {
		return err
	}
	var there bool
	err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1)", schemaName).Scan(&there)
	if err == nil && !there {
		_, err = conn.Exec(ctx, "CREATE SCHEMA "+schemaName+" AUTHORIZATION "+OwnerRole)
	}
	return err
}

// joinRoles has the owner be a member of the role of the daemon, and of those that nodes
// have of their own, so that the function disconnect, which is the owner's, may end the
// sessions of a dead node. The owner gains nothing else by it: it has the tables already,
// and whose events a session may write goes by who has logged in.
func joinRoles(ctx context.Context, conn *pgx.Conn) error {
	rows, _ := conn.Query(ctx, `SELECT rolname FROM pg_roles WHERE (rolname = $1 OR rolname LIKE 'kme\_node\_%') AND NOT rolsuper AND NOT pg_has_role($2::name, oid, 'USAGE') ORDER BY rolname`,
		AppRole, OwnerRole)
	roles, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, role := range roles {
		grant := grantToOwner(role)
		if _, err := conn.Exec(ctx, "DO $$ BEGIN "+grant+"; EXCEPTION WHEN unique_violation THEN NULL; END $$"); err != nil {
			return fmt.Errorf("%s, whose sessions %s may not end (have a superuser say %s): %w", role, OwnerRole, grant, err)
		}
	}
	return nil
}

// grantToOwner is the SQL by which the owner becomes a member of a role.
func grantToOwner(role string) string {
	return "GRANT " + pgx.Identifier{role}.Sanitize() + " TO " + OwnerRole
}

// checkRole refuses a role whose sessions the owner may not end: if this node is paused,
// nobody could take from it what it leads and locks.
func checkRole(ctx context.Context, conn *pgx.Conn) error {
	var role string
	var may bool
	if err := conn.QueryRow(ctx, "SELECT session_user, pg_has_role($1::name, session_user, 'USAGE')", OwnerRole).Scan(&role, &may); err != nil {
		return fmt.Errorf("reading what the role may do: %w", err)
	}
	if !may {
		return fmt.Errorf("%s may not end the sessions of the role %s, which must be possible if this node hangs: have a superuser say %s", OwnerRole, role, grantToOwner(role))
	}
	return nil
}

// applyMigrations runs goose as the owner of the schema.
func applyMigrations(ctx context.Context, cfg *pgx.ConnConfig, log *slog.Logger) (err error) {
	db := stdlib.OpenDB(*cfg, stdlib.OptionAfterConnect(func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, "SET ROLE "+OwnerRole)
		return err
	}))
	defer func() { err = errors.Join(err, db.Close()) }()
	files, err := fs.Sub(migrationFiles, "migrations")
	if err != nil {
		return err
	}
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockTimeout(1, 120))
	if err != nil {
		return err
	}
	provider, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithSessionLocker(locker), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return err
	}
	done, err := provider.Up(ctx)
	if err != nil {
		return err
	}
	for _, m := range done {
		log.Info("migrated the database", "to", m.Source.Version, "took", m.Duration.Round(time.Millisecond))
	}
	return nil
}

// fixEpochLength records the length of an epoch, which partitions are cut by and
// key_IDs are derived from: it can never be another one.
func fixEpochLength(ctx context.Context, conn *pgx.Conn, length time.Duration) error {
	_, err := conn.Exec(ctx, "INSERT INTO settings (epoch_ms) VALUES ($1) ON CONFLICT DO NOTHING", length.Milliseconds())
	if err != nil {
		return err
	}
	var ms int64
	if err := conn.QueryRow(ctx, "SELECT epoch_ms FROM settings").Scan(&ms); err != nil {
		return err
	}
	return checkEpochLength(ms, length)
}

func checkEpochLength(ms int64, length time.Duration) error {
	if ms != length.Milliseconds() {
		return fmt.Errorf("the database's epochs are %v long, not %v", time.Duration(ms)*time.Millisecond, length)
	}
	return nil
}

// checkSchema refuses a database that is not ours to use: of another schema
// version, epoch length or site, or with a role that is not set up. The first daemon of a new one writes its site.
func checkSchema(ctx context.Context, conn *pgx.Conn, cfg Config) error {
	var there bool
	if err := conn.QueryRow(ctx, "SELECT to_regclass('goose_db_version') IS NOT NULL").Scan(&there); err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("%w: it has no schema yet", ErrOldSchema)
	}
	var version int64
	if err := conn.QueryRow(ctx, "SELECT max(version_id) FROM goose_db_version WHERE is_applied").Scan(&version); err != nil {
		return fmt.Errorf("reading the schema's version: %w", err)
	}
	if version < schemaVersion {
		return fmt.Errorf("%w: it has version %d, and this program needs %d", ErrOldSchema, version, schemaVersion)
	}
	if version > schemaVersion {
		return fmt.Errorf("the database has schema version %d, and this program needs %d", version, schemaVersion)
	}
	if err := checkRole(ctx, conn); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, "UPDATE settings SET site = $1 WHERE site IS NULL", cfg.Site.String()); err != nil {
		return fmt.Errorf("writing the site: %w", err)
	}
	var ms int64
	var site string
	if err := conn.QueryRow(ctx, "SELECT epoch_ms, site FROM settings").Scan(&ms, &site); err != nil {
		return fmt.Errorf("reading the settings: %w", err)
	}
	if site != cfg.Site.String() {
		return fmt.Errorf("the database is that of KME %s, not of %s", site, cfg.Site)
	}
	return checkEpochLength(ms, cfg.EpochLength)
}
